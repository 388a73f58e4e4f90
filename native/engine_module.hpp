// The engine's part of the Python module.
#pragma once

#include <nanobind/nanobind.h>

void bind_engine(nanobind::module_& m);

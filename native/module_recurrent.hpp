// The part of the Python module that module_recurrent.cpp binds.
#pragma once

#include <nanobind/nanobind.h>

void bind_recurrent(nanobind::module_& m);

// The part of the Python module that module_gradient.cpp binds.
#pragma once

#include <nanobind/nanobind.h>

void bind_gradient(nanobind::module_& m);

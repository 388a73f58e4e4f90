// See module_spikes.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include "spikes.hpp"

// Kind, addresses of data, scales and bias, inputs, outputs, group, four strides (those of plain
// layers: none).
respike::PackedWeights packed_weights(nanobind::handle item);

void bind_spikes(nanobind::module_& m);

// The headers that must be included before an instruction set is selected, so that their functions
// are compiled for the baseline. The cells' formulas are not among them: GCC inlines a function
// only into code for the same instruction set, so kernels/cell_tile.h and convert.h include them
// later.
#pragma once

#if !defined(__GNUC__) || defined(__clang__)
#error "rnnfast's CPU kernels are written for GCC: set CXX=g++"
#endif

#include <array>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cells/common.h"
#include "cpu/cell.h"
#include "cpu/microkernels.h"

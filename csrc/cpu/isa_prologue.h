// Everything shared between instruction sets, included before a target is selected so that it is
// compiled for the baseline.
#pragma once

#if !defined(__GNUC__) || defined(__clang__)
#error "rnnfast's CPU kernels are written for GCC: set CXX=g++"
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "arguments.h"
#include "cells/common.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"

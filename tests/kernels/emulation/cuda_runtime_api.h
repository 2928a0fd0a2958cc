// Stands in for CUDA's header of this name: what the kernels' callers need.
#pragma once

#include <cstddef>
#include <cstdint>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

struct CUstream_st;
using cudaStream_t = CUstream_st*;

// The kernels for float32 logits.
#include "launch.cuh"

template cudaError_t safecode::cuda::launch<safecode::cuda::Float32>(Call, const Plan&, const Task&, cudaStream_t);

// The launch of the kernels of one dtype; each kernels_*.cu instantiates it once.
#pragma once

#include "kernels.cuh"
#include "launch.h"

namespace safecode::cuda {

template <class Format>
cudaError_t launch(Call call, const Plan& plan, const Task& task, cudaStream_t stream) {
  const bool decodes = call == Call::kDecode;
  Task planned = task;
  planned.blocks_per_row = plan.clusters || decodes ? plan.blocks_per_row : 1;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(planned.blocks_per_row);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(task.rows * planned.blocks_per_row));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.clusters ? 1 : 0;
  const auto kernel = plan.clusters ? (decodes ? decode_cluster<Format> : scores_cluster<Format>)
                                    : (decodes ? decode_blocks<Format> : scores_blocks<Format>);
  return cudaLaunchKernelEx(&config, kernel, planned);
}

}  // namespace safecode::cuda

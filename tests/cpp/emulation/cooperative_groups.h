// Stands in for the CUDA toolkit's header of this name; see emulator.h.
#pragma once

#include "emulator.h"

namespace cooperative_groups {

class cluster_group {
 public:
  unsigned block_rank() const { return emulated::current().block->rank; }
  unsigned num_blocks() const { return emulated::current().block->cluster->size; }
  void barrier_arrive() const { emulated::cluster_arrive(); }
  void barrier_wait() const { emulated::cluster_wait(); }
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  template <class T>
  T* map_shared_rank(T* place, int rank) const {
    return reinterpret_cast<T*>(emulated::shared_of_rank(place, static_cast<unsigned>(rank)));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

#ifndef GEMLOUPE_LAYERS_LAYER_SPEC_H_
#define GEMLOUPE_LAYERS_LAYER_SPEC_H_

#include <cstdint>

#include "ops/rope.h"

namespace gemloupe {

// Everything in which decoder layers differ. Decided once, when a model is loaded: no code asks for
// a model's name.
struct LayerSpec {
  int64_t window = 0;  // positions that a query may see, itself included; 0: all
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t intermediate_size = 0;
  int kv_source = 0;             // the layer whose keys and values are read
  bool shares_kv = false;        // kv_source is another layer
  bool values_are_keys = false;  // no v_proj: values come from the raw keys
  bool has_experts = false;
  bool bidirectional = false;  // a query also sees later positions of its pass
  // Queries stand behind the cache and see what it holds; where there is a window, its last
  // window + 1 positions (a drafter's layers).
  bool behind_cache = false;
  RopeSpec rope;
  int rope_index = 0;  // of PassContext::angles
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_LAYER_SPEC_H_

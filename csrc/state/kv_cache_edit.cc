// Edits of a KV cache: entries set, copied from another cache, moved to other positions.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "ops/dispatch.h"
#include "state/kv_cache.h"

namespace gemloupe {
namespace {

// An entry's way from a position of `cache` to a new one.
struct Move {
  const KvCache* cache;
  int64_t from;
  int64_t to;
};

// The rotations of moves begin, begin + 1, …: cosines and sines [n, pairs].
struct Rotations {
  RopeSpec rope;
  size_t begin = 0;
  std::vector<float> cos, sin;

  const float* CosOf(size_t move) const { return cos.data() + Offset(move); }
  const float* SinOf(size_t move) const { return sin.data() + Offset(move); }

 private:
  size_t Offset(size_t move) const { return (move - begin) * static_cast<size_t>(rope.pairs); }
};

// Every angle is the float32 product that rotated the key, or will rotate the queries; their difference
// is exact in float64, and so one rotation does what two would.
Rotations RotationsOf(const RopeSpec& rope, const std::vector<Move>& moves, size_t begin) {
  const std::vector<float> inv_freq = InverseFrequencies(rope);
  Rotations rotations{rope, begin, {}, {}};
  rotations.cos.reserve((moves.size() - begin) * inv_freq.size());
  rotations.sin.reserve((moves.size() - begin) * inv_freq.size());
  for (size_t i = begin; i < moves.size(); ++i) {
    const Move& move = moves[i];
    for (const float frequency : inv_freq) {
      const float from = static_cast<float>(move.from) * frequency;
      const float to = static_cast<float>(move.to) * frequency;
      const double angle = static_cast<double>(to) - static_cast<double>(from);
      rotations.cos.push_back(static_cast<float>(std::cos(angle)));
      rotations.sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  return rotations;
}

// One stored position.
struct Place {
  const KvBlockLayout* layout;
  const float* key_weight;  // where keys are derived
  const uint8_t* block;
  int64_t at;
};

// Copies entries between layouts of the same sizes.
class EntryCopier {
 public:
  explicit EntryCopier(const KvBlockLayout& layout)
      : keys_(static_cast<size_t>(layout.num_heads * layout.head_dim)),
        values_(keys_.size()),
        scales_(static_cast<size_t>(layout.num_heads)),
        bits_(keys_.size() * sizeof(float)) {}

  // Bits where both store alike, else values rounded to the new dtype; rotated where cos [pairs] is
  // given.
  void Copy(const Place& from, const KvBlockLayout& to, int64_t pairs, uint8_t* block, int64_t at,
            const float* cos, const float* sin) {
    const bool same_dtype = from.layout->dtype == to.dtype;
    const bool copies_keys = same_dtype && cos == nullptr && from.layout->derived == to.derived;
    if (!copies_keys) {
      ReadKv(*from.layout, from.key_weight, from.block, from.at, keys_.data(), values_.data());
    }
    if (copies_keys) {
      ReadKeyBits(*from.layout, from.block, from.at, bits_.data(), scales_.data());
      WriteKeyBits(to, block, at, bits_.data(), scales_.data());
    } else {
      if (cos != nullptr) Rotate(to, pairs, cos, sin);
      WriteKeys(to, block, at, keys_.data());
    }
    if (same_dtype) {
      ReadValueBits(*from.layout, from.block, from.at, bits_.data(), scales_.data());
      WriteValueBits(to, block, at, bits_.data(), scales_.data());
    } else {
      WriteValues(to, block, at, values_.data());
    }
  }

 private:
  void Rotate(const KvBlockLayout& layout, int64_t pairs, const float* cos, const float* sin) {
    for (int64_t head = 0; head < layout.num_heads; ++head) {
      Kernels().rope(keys_.data() + head * layout.head_dim, cos, sin, pairs, layout.head_dim / 2);
    }
  }

  std::vector<float> keys_, values_, scales_;
  std::vector<uint8_t> bits_;
};

Place PlaceOf(const KvView& view, int64_t position) {
  const auto block = static_cast<size_t>(position / kKvBlock - view.first_block);
  return {&view.layout, view.key_weight, view.blocks[block], position % kKvBlock};
}

int64_t TokensOf(const std::vector<KvPiece>& pieces) {
  int64_t tokens = 0;
  for (const KvPiece& piece : pieces) tokens += piece.end - piece.begin;
  return tokens;
}

Status CheckSameModel(const KvCache& a, const KvCache& b) {
  if (a.options().model_id == b.options().model_id && a.layers().size() == b.layers().size()) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("the other cache belongs to another model, expected the same");
}

}  // namespace

Status KvCache::CheckPositions(int layer, const std::vector<int64_t>& positions) const {
  const int64_t first = FirstPosition(layer);
  for (const int64_t position : positions) {
    if (position >= first && position < length()) continue;
    return absl::OutOfRangeError(absl::StrCat(
        "position ", position, " is not held by layer ", layer, ", expected ", first, " to ",
        length() - 1, KeepsAll(layer) ? "" : "; sliding=\"full\" keeps every position"));
  }
  return absl::OkStatus();
}

Status KvCache::Set(int layer, const std::vector<int64_t>& positions, ConstMatrix keys,
                    ConstMatrix values) {
  GL_CHECK(IsSource(layer));
  GL_RETURN_IF_ERROR(CheckPositions(layer, positions));
  if (positions.empty() || (keys.data == nullptr && values.data == nullptr)) {
    return absl::OkStatus();
  }
  SeparateKeys(layer);
  const KvBlockLayout& layout = layouts_[static_cast<size_t>(layer)];
  for (size_t i = 0; i < positions.size(); ++i) {
    uint8_t* block = WritableBlock(layer, positions[i] / kKvBlock);
    const int64_t at = positions[i] % kKvBlock;
    const auto row = static_cast<int64_t>(i);
    if (keys.data != nullptr) WriteKeys(layout, block, at, keys.row(row));
    if (values.data != nullptr) WriteValues(layout, block, at, values.row(row));
  }
  return absl::OkStatus();
}

Status KvCache::CopyFrom(const KvCache& other, int layer, const std::vector<int64_t>& positions) {
  GL_CHECK(IsSource(layer));
  GL_RETURN_IF_ERROR(CheckSameModel(*this, other));
  GL_RETURN_IF_ERROR(CheckPositions(layer, positions));
  GL_RETURN_IF_ERROR(other.CheckPositions(layer, positions));
  if (positions.empty()) return absl::OkStatus();
  const auto index = static_cast<size_t>(layer);
  if (!other.layouts_[index].derived) SeparateKeys(layer);
  const KvView view = other.View(layer);
  EntryCopier copier(layouts_[index]);
  for (const int64_t position : positions) {
    copier.Copy(PlaceOf(view, position), layouts_[index], layers_[index].rope.pairs,
                WritableBlock(layer, position / kKvBlock), position % kKvBlock, nullptr, nullptr);
  }
  return absl::OkStatus();
}

StatusOr<int64_t> KvCache::FirstSpliced(int layer, const std::vector<KvPiece>& pieces) const {
  const int64_t end = options_.start + TokensOf(pieces);
  const int64_t window = layers_[static_cast<size_t>(layer)].window;
  const int64_t needed =
      KeepsAll(layer) ? options_.start : std::max(options_.start, end - window + 1);
  // A ring keeps no block that has left the window.
  const int64_t kept = std::max(options_.start, needed / kKvBlock * kKvBlock);
  int64_t to = end;
  for (size_t i = pieces.size(); i-- > 0;) {
    const KvPiece& piece = pieces[i];
    const int64_t held = piece.cache->FirstPosition(layer);
    const int64_t first = std::clamp(held, piece.begin, piece.end);
    to -= piece.end - first;
    if (first == piece.begin) continue;
    if (to <= needed) return std::max(to, kept);
    return absl::OutOfRangeError(
        absl::StrCat("sliding layer ", layer, " would need position ", first - 1, " of ",
                     piece.cache == this ? "this cache" : "the other cache", ", which holds ", held,
                     " to ", piece.cache->length() - 1,
                     " there only; a cache made with sliding=\"full\" keeps every position"));
  }
  return kept;
}

struct KvCache::Splicing {
  const std::vector<KvPiece>* pieces;
  int64_t start, end;          // of the new sequence
  std::vector<Move> moves;     // of its entries, in order
  size_t unmoved = 0;          // leading entries that stay where they are
  std::vector<int64_t> first;  // by layer, the first position held
  std::vector<Rotations> rotations;

  // Those of the entries that move in any layer of this rope.
  const Rotations& RotationsFor(const RopeSpec& rope, const std::vector<KvLayerSpec>& layers);
};

const Rotations& KvCache::Splicing::RotationsFor(const RopeSpec& rope,
                                                 const std::vector<KvLayerSpec>& layers) {
  for (const Rotations& made : rotations) {
    if (made.rope == rope) return made;
  }
  size_t begin = moves.size();
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].source != static_cast<int>(i) || !(layers[i].rope == rope)) continue;
    begin = std::min(begin, static_cast<size_t>(first[i] - start));
  }
  rotations.push_back(RotationsOf(rope, moves, std::max(begin, unmoved)));
  return rotations.back();
}

Status KvCache::Splice(const std::vector<KvPiece>& pieces) {
  const int64_t end = options_.start + TokensOf(pieces);
  if (end - options_.start > options_.max_tokens) {
    return absl::OutOfRangeError(absl::StrCat("the sequence would have ", end - options_.start,
                                              " tokens, expected at most ", options_.max_tokens,
                                              " (max_tokens of this cache)"));
  }
  Splicing splicing{&pieces, options_.start, end, {}, 0, {}, {}};
  std::vector<int32_t> tokens;
  for (const KvPiece& piece : pieces) {
    GL_CHECK(piece.begin >= piece.cache->start() && piece.end <= piece.cache->length());
    GL_RETURN_IF_ERROR(CheckSameModel(*this, *piece.cache));
    for (int64_t from = piece.begin; from < piece.end; ++from) {
      const int64_t to = options_.start + static_cast<int64_t>(tokens.size());
      const bool stays = piece.cache == this && from == to;
      if (stays && splicing.unmoved == tokens.size()) ++splicing.unmoved;
      splicing.moves.push_back({piece.cache, from, to});
      tokens.push_back(
          piece.cache->tokens_[static_cast<size_t>(from - piece.cache->options_.start)]);
    }
  }
  splicing.first.assign(layers_.size(), options_.start);
  for (int i = 0; i < static_cast<int>(layers_.size()); ++i) {
    if (!IsSource(i)) continue;
    GL_ASSIGN_OR_RETURN(splicing.first[static_cast<size_t>(i)], FirstSpliced(i, pieces));
  }
  std::vector<Layer> spliced;
  for (int i = 0; i < static_cast<int>(layers_.size()); ++i) {
    spliced.push_back(SpliceLayer(i, splicing));
  }
  storage_ = std::move(spliced);
  tokens_ = std::move(tokens);
  return absl::OkStatus();
}

KvCache::Layer KvCache::SpliceLayer(int layer, Splicing& splicing) {
  const auto index = static_cast<size_t>(layer);
  const KvLayerSpec& spec = layers_[index];
  const int64_t first = splicing.first[index];
  Layer spliced;
  spliced.first_position = first;
  spliced.first_block = first / kKvBlock;
  if (!IsSource(layer)) return spliced;
  for (const KvPiece& piece : *splicing.pieces) {
    if (!piece.cache->layouts_[index].derived) SeparateKeys(layer);
  }
  std::vector<KvView> views;
  for (const KvPiece& piece : *splicing.pieces) views.push_back(piece.cache->View(layer));
  const KvBlockLayout& layout = layouts_[index];
  const Layer& old = storage_[index];
  const Rotations& rotations = splicing.RotationsFor(spec.rope, layers_);
  const int64_t shared_end = splicing.start + static_cast<int64_t>(splicing.unmoved);
  EntryCopier copier(layout);
  size_t piece = 0;
  for (int64_t block = spliced.first_block; block * kKvBlock < splicing.end; ++block) {
    const int64_t block_end = std::min(splicing.end, (block + 1) * kKvBlock);
    if (block_end <= shared_end) {
      spliced.blocks.push_back(old.blocks[static_cast<size_t>(block - old.first_block)]);
      continue;
    }
    spliced.blocks.push_back(std::make_shared<AlignedBuffer>(BlockBytes(layer)));
    for (int64_t to = std::max(block * kKvBlock, first); to < block_end; ++to) {
      const auto entry = static_cast<size_t>(to - splicing.start);
      const Move& move = splicing.moves[entry];
      while ((*splicing.pieces)[piece].cache != move.cache) ++piece;
      const bool moved = move.from != move.to;
      copier.Copy(PlaceOf(views[piece], move.from), layout, spec.rope.pairs,
                  spliced.blocks.back()->data(), to % kKvBlock,
                  moved ? rotations.CosOf(entry) : nullptr,
                  moved ? rotations.SinOf(entry) : nullptr);
    }
  }
  return spliced;
}

}  // namespace gemloupe

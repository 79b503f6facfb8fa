// Sources: the logits of one row, and where its gradients are written, in the form that kernels use.
#pragma once
#include "any_source.cuh"
#include "packed_source.cuh"

namespace fastkd::cuda {

// Calls body(pack, raw logits) for the packs of a pass.
template <bool kFirst, class Source, class Body>
__device__ __forceinline__ void for_packs(RowPass<kFirst, Source>& pass, const Body& body) {
#pragma unroll 1
  for (; pass.more(); pass.advance()) {
    const typename Source::Raw raw = pass.take();
    body(pass.pack, raw);
  }
}
template <bool kFirst, class Source, class Body>
__device__ __forceinline__ void for_packs(const Source& source, const Team& team, bool backwards, const Body& body) {
  RowPass<kFirst, Source> pass(source, team, backwards);
  for_packs(pass, body);
}

// The same with two bodies. fast(pack, raw) processes a pack by the short way and returns true, or returns false where
// that way would not be exact; careful(pack, raw) then processes it. Two loops keep the careful body's instructions and
// registers out of the fast one.
template <bool kFirst, class Source, class Fast, class Careful>
__device__ __forceinline__ void for_packs(RowPass<kFirst, Source>& pass, const Fast& fast, const Careful& careful) {
#pragma unroll 1
  while (true) {
    asm volatile("");  // keeps the compiler from merging the two loops
    typename Source::Raw raw;
#pragma unroll 1
    for (;; pass.advance()) {
      if (!pass.more()) return;
      raw = pass.take();
      if (!fast(pass.pack, raw)) break;
    }
    careful(pass.pack, raw);
    pass.advance();
  }
}

enum class SourceKind { kPackedFloat32, kPackedBFloat16, kPackedFloat16, kPackedMixed, kAny };

// Packs need contiguous columns, and rows that begin at the same place of a pack.
SourceKind source_kind(const RowArguments& arguments);

// Calls body with the Source type, and the size of its elements. kPair: there is a teacher.
template <class Source>
struct SourceType {
  using Type = Source;
};
template <bool kPair, class Body>
void with_source(SourceKind kind, const Body& body) {
  switch (kind) {
    case SourceKind::kPackedFloat32:
      return body(SourceType<PackedSource<float, kPair>>(), 4);
    case SourceKind::kPackedBFloat16:
      return body(SourceType<PackedSource<BFloat16, kPair>>(), 2);
    case SourceKind::kPackedFloat16:
      return body(SourceType<PackedSource<Float16, kPair>>(), 2);
    case SourceKind::kPackedMixed:
      if constexpr (kPair) return body(SourceType<PackedSource<Mixed, kPair>>(), 4);
      [[fallthrough]];  // without a teacher there is one dtype
    case SourceKind::kAny:
      return body(SourceType<AnySource>(), 4);
  }
}

}  // namespace fastkd::cuda

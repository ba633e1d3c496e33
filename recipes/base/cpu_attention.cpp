// Causal attention of packed rows on x86 cores with AMX or AVX-512's bf16, forward and backward, for heads of 64.
//
// Every product is one of 64 x 64 x 64: blocks of 64 keys by 64 queries. Scores are kept transposed, keys by queries,
// so that a vector's lanes are queries: maxima, sums and log-sum-exps are then plain vertical operations.
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <torch/extension.h>
#include <unistd.h>

#include <vector>

namespace {

constexpr int64_t N = 64;
using bf16 = at::BFloat16;

// 64 tokens by 64, or the other way round. Aligned: tiles that straddle lines of the cache take three times as long.
template <class T>
struct alignas(64) Block {
  T at[N * N];
  T* operator+(int64_t offset) { return at + offset; }
  const T* operator+(int64_t offset) const { return at + offset; }
};

bool asked_for_tiles() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
}

const bool amx = asked_for_tiles();

// The shape of AMX's eight tiles, for the time that this lives; then what was set before.
struct Tiles {
  alignas(64) uint8_t before[64];
  Tiles() {
    if (!amx) return;
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
      reinterpret_cast<uint16_t*>(config + 16)[tile] = 64;  // bytes a row
      config[48 + tile] = 16;                               // rows
    }
    _tile_storeconfig(before);
    _tile_loadconfig(config);
  }
  ~Tiles() {
    if (amx) before[0] ? _tile_loadconfig(before) : _tile_release();
  }
};

// As `multiply`, without AMX: four rows at a time, whose 16 vectors stay in registers.
template <bool add>
inline void multiply_rows(const Block<bf16>& a, const Block<bf16>& b, Block<float>& c) {
  for (int64_t i = 0; i < N; i += 4) {
    __m512 sums[4][4];
    for (int64_t row = 0; row < 4; row++)
      for (int64_t lane = 0; lane < 4; lane++)
        sums[row][lane] = add ? _mm512_load_ps(c + ((i + row) * N + 16 * lane)) : _mm512_setzero_ps();
    for (int64_t k = 0; k < N; k += 2) {
      __m512bh pairs[4];
      for (int64_t lane = 0; lane < 4; lane++)
        pairs[lane] = (__m512bh)_mm512_load_si512((const void*)(b + (k * N + 32 * lane)));
      for (int64_t row = 0; row < 4; row++) {
        const auto own = (__m512bh)_mm512_set1_epi32(*(const int*)(a + ((i + row) * N + k)));
        for (int64_t lane = 0; lane < 4; lane++) sums[row][lane] = _mm512_dpbf16_ps(sums[row][lane], own, pairs[lane]);
      }
    }
    for (int64_t row = 0; row < 4; row++)
      for (int64_t lane = 0; lane < 4; lane++) _mm512_store_ps(c + ((i + row) * N + 16 * lane), sums[row][lane]);
  }
}

// c[64][64] (+)= a[64][64] b[64][64], b as pairs of rows side by side: b[32][64][2].
template <bool add>
inline void multiply(const Block<bf16>& a, const Block<bf16>& b, Block<float>& c) {
  if (!amx) return multiply_rows<add>(a, b, c);
  for (int64_t i = 0; i < N; i += 32)
    for (int64_t j = 0; j < N; j += 32) {
      float* at = c + (i * N + j);
      if (add) {
        _tile_loadd(0, at, N * 4);
        _tile_loadd(1, at + 16, N * 4);
        _tile_loadd(2, at + 16 * N, N * 4);
        _tile_loadd(3, at + 16 * N + 16, N * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < N; k += 32) {
        _tile_loadd(4, a + (i * N + k), N * 2);
        _tile_loadd(5, a + ((i + 16) * N + k), N * 2);
        _tile_loadd(6, b + (k * N + 2 * j), N * 4);
        _tile_loadd(7, b + (k * N + 2 * j + 32), N * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, at, N * 4);
      _tile_stored(1, at + 16, N * 4);
      _tile_stored(2, at + 16 * N, N * 4);
      _tile_stored(3, at + 16 * N + 16, N * 4);
    }
}

// 2^x to 2e-7; 0 from -126 down.
inline __m512 exp2_(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(1.3333558e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, whole);
}

inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Rows 2p and 2p+1 side by side.
inline void store_pair(bf16* to, __m256i even, __m256i odd) {
  _mm512_store_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
}

// Lanes of 16 queries from `query` on that see `key`.
inline __mmask16 seeing(int64_t key, int64_t query) {
  const int64_t hidden = key - query;
  return hidden <= 0 ? 0xFFFF : hidden >= 16 ? 0 : (__mmask16)(0xFFFF << hidden);
}

// The states of one head in one row, in blocks of 64 tokens by 64, zeros after the last token. Blocks lie end to end:
// over longer strides, a power of two apart, tiles would fight for the same lines of the cache.
struct Head {
  std::vector<Block<bf16>> rows, columns, row_pairs, column_pairs;

  Head(const bf16* from, int64_t stride, int64_t tokens, bool columns_too, bool row_pairs_too, bool column_pairs_too)
      : rows((tokens + N - 1) / N) {
    for (int64_t t = 0; t < tokens; t++)
      std::copy(from + t * stride, from + t * stride + N, rows[t / N] + t % N * N);
    row_pairs.resize(row_pairs_too ? rows.size() : 0);        // [32 pairs of tokens][64][2]
    columns.resize(columns_too ? rows.size() : 0);            // [64][64 tokens]
    column_pairs.resize(column_pairs_too ? rows.size() : 0);  // [32][64 tokens][2]
    const __m512i steps = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(N / 2));
    for (size_t block = 0; block < rows.size(); block++) {
      const Block<bf16>& from = rows[block];
      for (int64_t t = 0; row_pairs_too && t < N; t += 2)
        for (int64_t d = 0; d < N; d += 16)
          store_pair(row_pairs[block] + (t * N + 2 * d), _mm256_load_si256((const __m256i*)(from + (t * N + d))),
                     _mm256_load_si256((const __m256i*)(from + (t * N + N + d))));
      for (int64_t t = 0; (columns_too || column_pairs_too) && t < N; t += 16)
        for (int64_t d = 0; d < N; d += 2) {
          const __m512i pairs = _mm512_i32gather_epi32(steps, (const int*)(from + (t * N + d)), 4);
          if (column_pairs_too) _mm512_store_si512(column_pairs[block] + (d * N + 2 * t), pairs);
          if (columns_too) {
            _mm256_store_si256((__m256i*)(columns[block] + (d * N + t)), _mm512_cvtepi32_epi16(pairs));
            _mm256_store_si256((__m256i*)(columns[block] + (d * N + N + t)),
                               _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
          }
        }
    }
  }
};

void forward_head(const bf16* q, const bf16* k, const bf16* v, int64_t stride, int64_t tokens, float scale, bf16* out,
                  int64_t out_stride, float* lse) {
  const Head Q(q, stride, tokens, false, false, true), K(k, stride, tokens, false, false, false),
      V(v, stride, tokens, true, false, false);
  Block<float> score, sum;
  Block<bf16> weight;
  alignas(64) float top[N], total[N];
  const __m512 to_base_2 = _mm512_set1_ps(scale * 1.44269504f), zero = _mm512_setzero_ps();
  for (int64_t i = 0; i < tokens; i += N) {
    std::fill(top, top + N, -1e30f);
    std::fill(total, total + N, 0.f);
    sum = {};
    for (int64_t j = 0; j <= i; j += N) {
      multiply<false>(K.rows[j / N], Q.column_pairs[i / N], score);
      __m512 most[4], added[4];
      for (int64_t lane = 0; lane < 4; lane++) most[lane] = _mm512_load_ps(top + 16 * lane), added[lane] = zero;
      for (int64_t key = 0; key < N; key++)
        for (int64_t lane = 0; lane < 4; lane++) {
          const __m512 s = _mm512_load_ps(score + (key * N + 16 * lane));
          most[lane] = i == j ? _mm512_mask_max_ps(most[lane], seeing(key, 16 * lane), most[lane], s)
                              : _mm512_max_ps(most[lane], s);
        }
      for (int64_t key = 0; key < N; key += 2)
        for (int64_t lane = 0; lane < 4; lane++) {
          __m512 p[2];
          for (int64_t odd = 0; odd < 2; odd++) {
            const __m512 s = _mm512_load_ps(score + ((key + odd) * N + 16 * lane));
            p[odd] = exp2_(_mm512_mul_ps(_mm512_sub_ps(s, most[lane]), to_base_2));
            if (i == j) p[odd] = _mm512_maskz_mov_ps(seeing(key + odd, 16 * lane), p[odd]);
            added[lane] = _mm512_add_ps(added[lane], p[odd]);
          }
          store_pair(weight + (key * N + 32 * lane), rounded(p[0]), rounded(p[1]));
        }
      for (int64_t lane = 0; lane < 4; lane++) {
        const __m512 before = _mm512_load_ps(top + 16 * lane), held = _mm512_load_ps(total + 16 * lane);
        const __m512 fade = exp2_(_mm512_mul_ps(_mm512_sub_ps(before, most[lane]), to_base_2));
        _mm512_store_ps(total + 16 * lane, _mm512_fmadd_ps(held, fade, added[lane]));
        _mm512_store_ps(top + 16 * lane, most[lane]);
        if (_mm512_cmp_ps_mask(before, most[lane], _CMP_NEQ_OQ))
          for (float* at = sum + 16 * lane; at < sum + N * N; at += N)
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), fade));
      }
      multiply<true>(V.columns[j / N], weight, sum);
    }
    for (int64_t t = i; t < std::min(i + N, tokens); t++) {
      lse[t] = top[t - i] * scale * 1.44269504f + std::log2(total[t - i]);
      for (int64_t d = 0; d < N; d++) out[t * out_stride + d] = sum.at[d * N + t - i] / total[t - i];
    }
  }
}

void backward_head(const bf16* q, const bf16* k, const bf16* v, int64_t stride, int64_t tokens, float scale,
                   const bf16* out, const bf16* grad, int64_t out_stride, const float* lse, bf16* dq, bf16* dk, bf16* dv,
                   int64_t d_stride) {
  const Head Q(q, stride, tokens, false, true, true), G(grad, out_stride, tokens, false, true, true),
      K(k, stride, tokens, true, false, false), V(v, stride, tokens, false, false, false);
  const int64_t padded = Q.rows.size() * N;
  std::vector<float> level(padded, 1e30f), delta(padded, 0.f);
  std::vector<Block<float>> sum_q(Q.rows.size());  // [64][64 tokens]
  for (int64_t t = 0; t < tokens; t++) {
    level[t] = lse[t];
    for (int64_t d = 0; d < N; d++) delta[t] += float(out[t * out_stride + d]) * float(grad[t * out_stride + d]);
  }
  Block<float> score, slope, sum_k, sum_v;
  Block<bf16> weight, change, change_pairs;
  const __m512 to_base_2 = _mm512_set1_ps(scale * 1.44269504f), scaled = _mm512_set1_ps(scale);
  for (int64_t j = 0; j < padded; j += N) {
    sum_k = sum_v = {};
    for (int64_t i = j; i < padded; i += N) {
      multiply<false>(K.rows[j / N], Q.column_pairs[i / N], score);
      multiply<false>(V.rows[j / N], G.column_pairs[i / N], slope);
      __m512 levels[4], deltas[4];
      for (int64_t lane = 0; lane < 4; lane++) {
        levels[lane] = _mm512_loadu_ps(&level[i + 16 * lane]);
        deltas[lane] = _mm512_loadu_ps(&delta[i + 16 * lane]);
      }
      for (int64_t key = 0; key < N; key += 2)
        for (int64_t lane = 0; lane < 4; lane++) {
          __m256i changed[2];
          for (int64_t odd = 0; odd < 2; odd++) {
            const int64_t at = (key + odd) * N + 16 * lane;
            __m512 p = exp2_(_mm512_fmsub_ps(_mm512_load_ps(score + at), to_base_2, levels[lane]));
            if (i == j) p = _mm512_maskz_mov_ps(seeing(key + odd, 16 * lane), p);
            const __m512 d = _mm512_sub_ps(_mm512_load_ps(slope + at), deltas[lane]);
            _mm256_store_si256((__m256i*)(weight + at), rounded(p));
            changed[odd] = rounded(_mm512_mul_ps(d, _mm512_mul_ps(p, scaled)));
            _mm256_store_si256((__m256i*)(change + at), changed[odd]);
          }
          store_pair(change_pairs + (key * N + 32 * lane), changed[0], changed[1]);
        }
      multiply<true>(weight, G.row_pairs[i / N], sum_v);
      multiply<true>(change, Q.row_pairs[i / N], sum_k);
      multiply<true>(K.columns[j / N], change_pairs, sum_q[i / N]);
    }
    for (int64_t t = j; t < std::min(j + N, tokens); t++)
      for (int64_t d = 0; d < N; d++) {
        dk[t * d_stride + d] = sum_k.at[(t - j) * N + d];
        dv[t * d_stride + d] = sum_v.at[(t - j) * N + d];
      }
  }
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t d = 0; d < N; d++) dq[t * d_stride + d] = sum_q[t / N].at[d * N + t % N];
}

template <class Work>
void each_head(const std::vector<int64_t>& lengths, int64_t heads, Work work) {
  std::vector<int64_t> starts{0};
  for (auto length : lengths) starts.push_back(starts.back() + length);
  at::parallel_for(0, (int64_t)lengths.size() * heads, 1, [&](int64_t from, int64_t to) {
    const Tiles tiles;
    for (int64_t one = from; one < to; one++) work(starts[one / heads], lengths[one / heads], one % heads);
  });
}

}  // namespace

bool available() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

// States [tokens][heads][64], contiguous. Returns output and log-sum-exp (base 2) [heads][tokens].
std::vector<at::Tensor> forward(at::Tensor q, at::Tensor k, at::Tensor v, std::vector<int64_t> lengths, double scale) {
  const int64_t tokens = q.size(0), heads = q.size(1), stride = heads * N;
  auto out = at::empty_like(q), lse = at::empty({heads, tokens}, q.options().dtype(at::kFloat));
  auto *Q = q.data_ptr<bf16>(), *K = k.data_ptr<bf16>(), *V = v.data_ptr<bf16>(), *O = out.data_ptr<bf16>();
  auto* L = lse.data_ptr<float>();
  each_head(lengths, heads, [&](int64_t start, int64_t length, int64_t head) {
    const int64_t at = start * stride + head * N;
    forward_head(Q + at, K + at, V + at, stride, length, scale, O + at, stride, L + head * tokens + start);
  });
  return {out, lse};
}

std::vector<at::Tensor> backward(at::Tensor grad, at::Tensor q, at::Tensor k, at::Tensor v, at::Tensor out,
                                 at::Tensor lse, std::vector<int64_t> lengths, double scale) {
  const int64_t tokens = q.size(0), heads = q.size(1), stride = heads * N;
  auto dq = at::empty_like(q), dk = at::empty_like(q), dv = at::empty_like(q);
  auto *G = grad.data_ptr<bf16>(), *Q = q.data_ptr<bf16>(), *K = k.data_ptr<bf16>(), *V = v.data_ptr<bf16>();
  auto *O = out.data_ptr<bf16>(), *DQ = dq.data_ptr<bf16>(), *DK = dk.data_ptr<bf16>(), *DV = dv.data_ptr<bf16>();
  auto* L = lse.data_ptr<float>();
  each_head(lengths, heads, [&](int64_t start, int64_t length, int64_t head) {
    const int64_t at = start * stride + head * N;
    backward_head(Q + at, K + at, V + at, stride, length, scale, O + at, G + at, stride, L + head * tokens + start,
                  DQ + at, DK + at, DV + at, stride);
  });
  return {dq, dk, dv};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("available", &available);
  module.def("forward", &forward);
  module.def("backward", &backward);
}

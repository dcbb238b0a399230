// The operations on CPU tensors: one file behind a C ABI, loaded by ctypes, so that one library serves every torch and
// Python. `build.py` compiles it once for each instruction set (FU_LEVEL) and once for what chooses between them
// (FU_MAIN), and links the objects.
//
// The same bits for every number of threads and every instruction set:
//   * each operation is rounded as IEEE 754 says: compiled with -ffp-contract=off, and no fused multiply-add by hand;
//   * work is cut into pieces by the tensors' sizes alone, never by the number of threads;
//   * a sum runs over 16 or 32 lanes, whatever the width of a register; lanes and pieces are added in one fixed order.
//
// Everything but the entry points is in an unnamed namespace, and no header of C++ is used: what the objects of two
// levels both define, a linker may take from the wrong one.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))

// ---- what Python fills in: mirrored in native_calls.py ------------------------------------------------------------

enum Dtype : int32_t { F32 = 0, BF16 = 1, F16 = 2, U8 = 3 };
enum Mode : int32_t { DENSE = 0, SELECT = 1, COMPACT = 2 };

// One parameter; all its tensors are flat, in the order of the parameter's memory.
struct AdamTensor {
    void *param;
    float *exp_avg, *exp_avg_sq, *master, *step;
    const uint8_t *bits;
    const int64_t *ranks;
    int64_t numel;
    int32_t dtype, mode, group, unused;
};

// What changes between two steps of it.
struct AdamGradient {
    const void *grad, *other;
    int64_t grad_dtype, other_dtype;
};

struct AdamGroup {
    double lr, beta1, beta2, eps, weight_decay;
};

struct DotTensor {
    const void *gradient0, *gradient1;
    const uint8_t *bits;
    int64_t numel, dtype0, dtype1;
};

struct ScoreTensor {
    float *scores;
    const void *gradient;
    uint8_t *bits;
    int64_t numel, dtype;
};

struct Loss {
    const void *noise_pred, *teacher;
    const float *coefficients, *weights;
    const void *noise;
    const float *noise_coefficients;
    const void *latents;
    const float *snr;
    const void *spatial_mask, *row_index;
    void *gradient;
    float *per_row, *loss;
    int64_t batch, numel, teachers, bank_rows, teacher_stride, row_stride, mask_row_stride, mask_channel_stride, pixels;
    int64_t dtype, teacher_dtype, noise_dtype, latents_dtype, mask_dtype, gradient_dtype, index_is_64, prediction_type;
    double snr_gamma, huber_delta;  // 0: without
};

struct LpipsLayer {
    const void *features0, *features1;
    const float *weights;
    int64_t pixels, channels;
};

struct Kernels {
    int (*adamw)(const AdamTensor *, const AdamGradient *, const AdamGroup *, int64_t, float, float, int);
    int (*dots)(const DotTensor *, int64_t, double *, int);
    int (*accumulate)(const ScoreTensor *, int64_t, int, int);
    int (*select)(const ScoreTensor *, int64_t, int64_t, int);
    int (*loss)(const Loss *, int);
    int (*lpips)(const LpipsLayer *, int64_t, int64_t, int, float *, int);
};

enum Status : int { OK = 0, OUT_OF_MEMORY = 1, BAD_ROW = 2 };

#if defined(FU_LEVEL)
// ==== one instruction set ==========================================================================================
#if FU_LEVEL == 2
#define FU_KERNELS fu_kernels_avx512
#elif FU_LEVEL == 1
#define FU_KERNELS fu_kernels_avx2
#else
#define FU_KERNELS fu_kernels_baseline
#endif

namespace {

const int BLOCK = 1024;    // elements: of a parameter's ranks, and of what is converted at once
const int64_t PIECE = 65536;  // elements: a partial sum each, and a thread's least share of the cheap operations

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// A buffer that is freed at the end of its scope.
template <class T> struct Buffer {
    T *data;
    explicit Buffer(int64_t n) : data((T *)calloc(n > 0 ? n : 1, sizeof(T))) {}
    ~Buffer() { free(data); }
    Buffer(const Buffer &) = delete;
    void operator=(const Buffer &) = delete;
    T &operator[](int64_t i) { return data[i]; }
};

INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t pieces_of(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }
INLINE int threads_for(int threads, int64_t pieces) { return int(lesser(threads < 1 ? 1 : threads, pieces > 1 ? pieces : 1)); }

// The tensor that a piece belongs to: the last k with first[k] <= piece.
INLINE int64_t tensor_of(const int64_t *first, int64_t count, int64_t piece) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (first[middle] <= piece) low = middle; else high = middle;
    }
    return low;
}

// ---- registers ----------------------------------------------------------------------------------------------------

#if FU_LEVEL == 2
typedef __m512 vf;
typedef __mmask16 vmask;
const int W = 16;
INLINE vf splat(float x) { return _mm512_set1_ps(x); }
INLINE vf load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vf load(const bf16 *p) {
    __m256i h = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
INLINE vf load(const f16 *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE void store(bf16 *p, vf x) {
    __m512i u = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
INLINE void store(f16 *p, vf x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void store_chosen(float *p, vf x, vmask k, unsigned) { _mm512_mask_storeu_ps(p, k, x); }
template <class T> INLINE void store_chosen(T *p, vf x, vmask k, unsigned) {
    T all[16];
    store(all, x);
    _mm256_mask_storeu_epi16(p, k, _mm256_loadu_si256((const __m256i *)all));
}
INLINE vf root(vf x) { return _mm512_sqrt_ps(x); }
INLINE vmask mask_of(unsigned bits) { return (vmask)bits; }
INLINE vf blend(vmask k, vf yes, vf no) { return _mm512_mask_mov_ps(no, k, yes); }
INLINE vf keep(vmask k, vf x) { return _mm512_maskz_mov_ps(k, x); }
INLINE vf vabs(vf x) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff))); }
INLINE vmask is_nonzero(vf x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
INLINE vmask is_above(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ); }
INLINE void compress(float *out, vf x, unsigned bits) { _mm512_storeu_ps(out, _mm512_maskz_compress_ps((vmask)bits, x)); }
INLINE vf expand(const float *p, unsigned bits) { return _mm512_maskz_expand_ps((vmask)bits, _mm512_loadu_ps(p)); }
// Keys order as |x| does: its bits as an integer, which are not negative; NaN is not salient and has key 0.
typedef __m512i vkey;
INLINE vkey keys_of(const float *p) {
    __m512i key = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0x7fffffff));
    return _mm512_maskz_mov_epi32(_mm512_cmple_epi32_mask(key, _mm512_set1_epi32(0x7f800000)), key);
}
INLINE void store(int32_t *p, vkey key) { _mm512_storeu_si512(p, key); }
INLINE unsigned is_above(vkey key, int32_t x) { return _mm512_cmpgt_epi32_mask(key, _mm512_set1_epi32(x)); }
INLINE unsigned is_equal(vkey key, int32_t x) { return _mm512_cmpeq_epi32_mask(key, _mm512_set1_epi32(x)); }
#elif FU_LEVEL == 1
typedef __m256 vf;
typedef __m256 vmask;
const int W = 8;
INLINE vf splat(float x) { return _mm256_set1_ps(x); }
INLINE vf load(const float *p) { return _mm256_loadu_ps(p); }
INLINE vf load(const bf16 *p) {
    __m128i h = _mm_loadu_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
INLINE vf load(const f16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store(float *p, vf x) { _mm256_storeu_ps(p, x); }
INLINE void store(bf16 *p, vf x) {
    __m256i u = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    r = _mm256_srli_epi32(r, 16);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
INLINE void store(f16 *p, vf x) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
INLINE void store_chosen(float *p, vf x, vmask k, unsigned) { _mm256_storeu_ps(p, _mm256_blendv_ps(_mm256_loadu_ps(p), x, k)); }
template <class T> INLINE void store_chosen(T *p, vf x, vmask k, unsigned) {
    T all[8];
    store(all, x);
    __m256i wide = _mm256_castps_si256(k);
    __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    __m128i fresh = _mm_loadu_si128((const __m128i *)all), old = _mm_loadu_si128((const __m128i *)p);
    _mm_storeu_si128((__m128i *)p, _mm_blendv_epi8(old, fresh, narrow));
}
INLINE vf root(vf x) { return _mm256_sqrt_ps(x); }
INLINE vmask mask_of(unsigned bits) {
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), place), place));
}
INLINE vf blend(vmask k, vf yes, vf no) { return _mm256_blendv_ps(no, yes, k); }
INLINE vf keep(vmask k, vf x) { return _mm256_and_ps(k, x); }
INLINE vf vabs(vf x) { return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
INLINE vmask is_nonzero(vf x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ); }
INLINE vmask is_above(vf x, vf y) { return _mm256_cmp_ps(x, y, _CMP_GT_OQ); }
// for each byte of bits: places of its ones in order, and how many ones lie below each place
struct Lanes {
    uint64_t ones[256], ranks[256];
    constexpr Lanes() : ones(), ranks() {
        for (int bits = 0; bits < 256; bits++) {
            int count = 0;
            for (int c = 0; c < 8; c++) {
                ranks[bits] |= (uint64_t)count << (8 * c);
                if (bits >> c & 1) ones[bits] |= (uint64_t)c << (8 * count++);
            }
        }
    }
};
alignas(64) const Lanes lanes;
INLINE void compress(float *out, vf x, unsigned bits) {
    __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)lanes.ones[bits]));
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(x, order));
}
INLINE vf expand(const float *p, unsigned bits) {
    __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)lanes.ranks[bits]));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), order);
}
typedef __m256i vkey;
INLINE vkey keys_of(const float *p) {
    __m256i key = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi32(0x7fffffff));
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(key, _mm256_set1_epi32(0x7f800000)), key);
}
INLINE void store(int32_t *p, vkey key) { _mm256_storeu_si256((__m256i *)p, key); }
INLINE unsigned signs(vkey x) { return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(x)); }
INLINE unsigned is_above(vkey key, int32_t x) { return signs(_mm256_cmpgt_epi32(key, _mm256_set1_epi32(x))); }
INLINE unsigned is_equal(vkey key, int32_t x) { return signs(_mm256_cmpeq_epi32(key, _mm256_set1_epi32(x))); }
#else  // four lanes: SSE2, NEON, and whatever else the compiler makes of them
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vmask __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
const int W = 4;
INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, u;
    if (rest >= 0x7c00) {
        u = sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0);
    } else if (rest >= 0x400) {
        u = sign | ((rest << 13) + ((127 - 15) << 23));
    } else {
        float small = (float)rest * 5.9604644775390625e-8f;  // 2^-24: exact
        memcpy(&u, &small, 4);
        u |= sign;
    }
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE uint16_t float_to_half(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (u >> 13 & 0x3ff));
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and beyond
    if (u < 0x38800000) {  // below 2^-14: adding 1/2 makes the fp32 unit in the last place that of a denormal
        float x;
        memcpy(&x, &u, 4);
        x += 0.5f;
        memcpy(&u, &x, 4);
        return (uint16_t)(sign | (u - 0x3f000000));
    }
    u += 0xfff + (u >> 13 & 1) - ((127 - 15) << 23);
    return (uint16_t)(sign | u >> 13);
}
INLINE vf splat(float x) { return vf{x, x, x, x}; }
INLINE vf load(const float *p) { vf x; memcpy(&x, p, 16); return x; }
INLINE vf load(const bf16 *p) {
    vu u = {(uint32_t)p[0].bits << 16, (uint32_t)p[1].bits << 16, (uint32_t)p[2].bits << 16, (uint32_t)p[3].bits << 16};
    return (vf)u;
}
INLINE vf load(const f16 *p) {
    return vf{half_to_float(p[0].bits), half_to_float(p[1].bits), half_to_float(p[2].bits), half_to_float(p[3].bits)};
}
INLINE void store(float *p, vf x) { memcpy(p, &x, 16); }
INLINE void store(bf16 *p, vf x) {
    vu u = (vu)x, r = u + 0x7fff + (u >> 16 & 1);
    vu nan = (vu)(x != x);
    r = ((nan & (u | 0x400000)) | (~nan & r)) >> 16;
    for (int c = 0; c < 4; c++) p[c].bits = (uint16_t)r[c];
}
INLINE void store(f16 *p, vf x) { for (int c = 0; c < 4; c++) p[c].bits = float_to_half(x[c]); }
INLINE void store_chosen(float *p, vf x, vmask k, unsigned) { store(p, (vf)((k & (vmask)x) | (~k & (vmask)load(p)))); }
template <class T> INLINE void store_chosen(T *p, vf x, vmask, unsigned chosen) {
    T all[4];
    store(all, x);
    for (int c = 0; c < 4; c++) p[c] = chosen >> c & 1 ? all[c] : p[c];
}
INLINE vf root(vf x) {
#if defined(__x86_64__)
    return (vf)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (vf)vsqrtq_f32((float32x4_t)x);
#else
    return vf{sqrtf(x[0]), sqrtf(x[1]), sqrtf(x[2]), sqrtf(x[3])};
#endif
}
INLINE vmask mask_of(unsigned bits) {
    const vmask place = {1, 2, 4, 8};
    vmask all = {(int)bits, (int)bits, (int)bits, (int)bits};
    return (all & place) == place;
}
INLINE vf blend(vmask k, vf yes, vf no) { return (vf)((k & (vmask)yes) | (~k & (vmask)no)); }
INLINE vf keep(vmask k, vf x) { return (vf)(k & (vmask)x); }
INLINE vf vabs(vf x) { return (vf)((vu)x & 0x7fffffff); }
INLINE vmask is_nonzero(vf x) { return x != splat(0); }
INLINE vmask is_above(vf x, vf y) { return x > y; }
INLINE void compress(float *out, vf x, unsigned bits) {
    int k = 0;
    for (int c = 0; c < 4; c++) {
        out[k] = x[c];
        k += bits >> c & 1;
    }
}
INLINE vf expand(const float *p, unsigned bits) {
    float out[4];
    int k = 0;
    for (int c = 0; c < 4; c++) {
        out[c] = p[k];
        k += bits >> c & 1;
    }
    return vf{out[0], out[1], out[2], out[3]};
}
typedef vmask vkey;
INLINE vkey keys_of(const float *p) {
    vkey key;
    memcpy(&key, p, 16);
    key = key & 0x7fffffff;
    return key & (key <= 0x7f800000);
}
INLINE void store(int32_t *p, vkey key) { memcpy(p, &key, 16); }
INLINE unsigned signs(vkey x) { return (x[0] & 1) | (x[1] & 2) | (x[2] & 4) | (x[3] & 8); }
INLINE unsigned is_above(vkey key, int32_t x) { return signs(key > x); }
INLINE unsigned is_equal(vkey key, int32_t x) { return signs(key == x); }
#endif

const unsigned ALL = (1u << W) - 1;

// The last elements of a tensor: what lies beyond them is not touched.
template <class T> INLINE vf load_some(const T *p, int n) {
    T part[W] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}
template <class T> INLINE void store_some(T *p, vf x, int n) {
    T part[W];
    store(part, x);
    memcpy(p, part, n * sizeof(T));
}

template <class T> INLINE void store_few(T *p, vf x, unsigned chosen) {
    T part[W];
    store(part, x);
    for (int c = 0; c < W; c++)
        if (chosen >> c & 1) p[c] = part[c];
}

// The mask bits of elements i to i + W - 1, of which `left` are there.
INLINE unsigned bits_at(const uint8_t *bits, int64_t i, int64_t left) {
#if FU_LEVEL == 2
    unsigned low = bits[i >> 3];
    return left > 8 ? low | (unsigned)bits[(i >> 3) + 1] << 8 : low;
#elif FU_LEVEL == 1
    (void)left;
    return bits[i >> 3];
#else
    (void)left;
    return bits[i >> 3] >> (i & 4) & 15;
#endif
}


// L sums side by side in fp32. Element i of what is summed always goes to lane i % L.
template <int L> struct Sums {
    vf part[L / W];
    INLINE_MEMBER Sums() { for (int q = 0; q < L / W; q++) part[q] = splat(0); }
    // lanes c and c + L/2, then c + L/4 and so on: the same tree for every W
    INLINE_MEMBER float whole() const {
        alignas(64) float x[L];
        for (int q = 0; q < L / W; q++) store(x + q * W, part[q]);
        for (int width = L / 2; width; width /= 2)
            for (int c = 0; c < width; c++) x[c] = x[c] + x[c + width];
        return x[0];
    }
    INLINE_MEMBER void move_to(double *lanes) {
        alignas(64) float x[L];
        for (int q = 0; q < L / W; q++) { store(x + q * W, part[q]); part[q] = splat(0); }
        for (int c = 0; c < L; c++) lanes[c] += (double)x[c];
    }
};

INLINE double sum_of(const double *lanes, int count) {
    double sum = 0;
    for (int c = 0; c < count; c++) sum += lanes[c];
    return sum;
}

// n <= BLOCK elements of any dtype in fp32
template <class T> INLINE void convert_block(float *out, const T *in, int n) {
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, load(in + i));
    if (i < n) store_some(out + i, load_some(in + i, n - i), n - i);
}
void convert(float *out, const void *in, int64_t offset, int64_t dtype, int n) {
    if (dtype == F32) memcpy(out, (const float *)in + offset, n * sizeof(float));
    else if (dtype == BF16) convert_block(out, (const bf16 *)in + offset, n);
    else if (dtype == F16) convert_block(out, (const f16 *)in + offset, n);
    else for (int i = 0; i < n; i++) out[i] = (float)((const uint8_t *)in)[offset + i];
}
// out = x + c y, on n <= BLOCK elements of fp32
INLINE void add_scaled(float *out, const float *x, float c, const float *y, int n) {
    vf factor = splat(c);
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, load(x + i) + factor * load(y + i));
    if (i < n) store_some(out + i, load_some(x + i, n - i) + factor * load_some(y + i, n - i), n - i);
}

// ---- masked AdamW -------------------------------------------------------------------------------------------------

struct Hyper {
    float decay, step_size, correction2, one_minus_beta1, beta2, one_minus_beta2, eps, scale;
};
struct HyperV {
    vf decay, step_size, correction2, one_minus_beta1, beta2, one_minus_beta2, eps, scale;
    INLINE_MEMBER explicit HyperV(const Hyper &h)
        : decay(splat(h.decay)), step_size(splat(h.step_size)), correction2(splat(h.correction2)),
          one_minus_beta1(splat(h.one_minus_beta1)), beta2(splat(h.beta2)), one_minus_beta2(splat(h.one_minus_beta2)),
          eps(splat(h.eps)), scale(splat(h.scale)) {}
};

INLINE void adamw_lanes(vf g, vf &m, vf &v, vf &w, const HyperV &h) {
    g = g * h.scale;
    m = m + h.one_minus_beta1 * (g - m);
    v = h.beta2 * v + h.one_minus_beta2 * g * g;
    vf update = h.step_size * m / (root(v) * h.correction2 + h.eps);
    w = w - (w * h.decay + update);  // rounded once at the size of w: a small decay is lost only with a small update
}

// n <= BLOCK elements with states of their own; without `bits` all of them
template <class P, class G, bool MASTER>
void adamw_full(P *p, const G *g, float *m, float *v, float *w, const uint8_t *bits, int n, const Hyper &hyper) {
    const HyperV h(hyper);
    for (int i = 0; i < n; i += W) {
        int left = n - i;
        unsigned inside = left < W ? (1u << left) - 1 : ALL;
        unsigned chosen = bits ? bits_at(bits, i, left) & inside : inside;
        if (!chosen) continue;
        if (left >= W) {
            vf m1 = load(m + i), v1 = load(v + i), w1 = MASTER ? load(w + i) : load(p + i);
            adamw_lanes(load(g + i), m1, v1, w1, h);
            if (chosen == ALL) {
                store(m + i, m1);
                store(v + i, v1);
                if (MASTER) store(w + i, w1);
                store(p + i, w1);
            } else {
                vmask k = mask_of(chosen);
                store_chosen(m + i, m1, k, chosen);
                store_chosen(v + i, v1, k, chosen);
                if (MASTER) store_chosen(w + i, w1, k, chosen);
                store_chosen(p + i, w1, k, chosen);
            }
        } else {
            vf m1 = load_some(m + i, left), v1 = load_some(v + i, left);
            vf w1 = MASTER ? load_some(w + i, left) : load_some(p + i, left);
            adamw_lanes(load_some(g + i, left), m1, v1, w1, h);
            store_few(m + i, m1, chosen);
            store_few(v + i, v1, chosen);
            if (MASTER) store_few(w + i, w1, chosen);
            store_few(p + i, w1, chosen);
        }
    }
}

// n <= BLOCK elements of which the chosen ones have states, side by side: pressed into buffers that stay in the first
// cache, stepped there, spread out again
template <class P, class G, bool MASTER>
void adamw_compact(P *p, const G *g, float *m, float *v, float *w, const uint8_t *bits, int n, const Hyper &hyper) {
    alignas(64) float gg[BLOCK + W], ww[BLOCK + W];
    const HyperV h(hyper);
    int count = 0;
    for (int i = 0; i < n; i += W) {
        int left = n - i;
        unsigned chosen = bits_at(bits, i, left) & (left < W ? (1u << left) - 1 : ALL);
        if (!chosen) continue;
        compress(gg + count, left < W ? load_some(g + i, left) : load(g + i), chosen);
        if (!MASTER) compress(ww + count, left < W ? load_some(p + i, left) : load(p + i), chosen);
        count += __builtin_popcount(chosen);
    }
    int j = 0;
    for (; j + W <= count; j += W) {
        vf m1 = load(m + j), v1 = load(v + j), w1 = load((MASTER ? w : ww) + j);
        adamw_lanes(load(gg + j), m1, v1, w1, h);
        store(m + j, m1);
        store(v + j, v1);
        if (MASTER) store(w + j, w1);
        store(ww + j, w1);
    }
    if (j < count) {
        int left = count - j;
        vf m1 = load_some(m + j, left), v1 = load_some(v + j, left), w1 = load_some((MASTER ? w : ww) + j, left);
        adamw_lanes(load_some(gg + j, left), m1, v1, w1, h);
        store_some(m + j, m1, left);
        store_some(v + j, v1, left);
        if (MASTER) store_some(w + j, w1, left);
        store(ww + j, w1);
    }
    const float *fresh = ww;
    for (int i = 0; i < n; i += W) {
        int left = n - i;
        unsigned chosen = bits_at(bits, i, left) & (left < W ? (1u << left) - 1 : ALL);
        if (!chosen) continue;
        vf w1 = expand(fresh, chosen);
        fresh += __builtin_popcount(chosen);
        if (left < W) store_few(p + i, w1, chosen);
        else if (chosen == ALL) store(p + i, w1);
        else store_chosen(p + i, w1, mask_of(chosen), chosen);
    }
}

template <class P, class G, bool MASTER>
INLINE void adamw_block(const AdamTensor &t, const G *g, int64_t block, int n, const Hyper &hyper) {
    int64_t start = block * BLOCK, states = t.mode == COMPACT ? t.ranks[block] : start;
    P *p = (P *)t.param + start;
    float *m = t.exp_avg + states, *v = t.exp_avg_sq + states, *w = MASTER ? t.master + states : nullptr;
    if (t.mode == COMPACT) adamw_compact<P, G, MASTER>(p, g, m, v, w, t.bits + start / 8, n, hyper);
    else adamw_full<P, G, MASTER>(p, g, m, v, w, t.mode == SELECT ? t.bits + start / 8 : nullptr, n, hyper);
}

INLINE void adamw_any_block(const AdamTensor &t, const AdamGradient &gradient, int64_t block, float coefficient, const Hyper &h) {
    int64_t start = block * BLOCK;
    int n = (int)lesser(BLOCK, t.numel - start);
    if (!gradient.other && t.dtype == F32 && gradient.grad_dtype == F32)
        return adamw_block<float, float, false>(t, (const float *)gradient.grad + start, block, n, h);
    if (!gradient.other && t.dtype == BF16 && gradient.grad_dtype == BF16)
        return adamw_block<bf16, bf16, true>(t, (const bf16 *)gradient.grad + start, block, n, h);
    alignas(64) float g[BLOCK], other[BLOCK];
    convert(g, gradient.grad, start, gradient.grad_dtype, n);
    if (gradient.other) {
        convert(other, gradient.other, start, gradient.other_dtype, n);
        add_scaled(g, g, coefficient, other, n);
    }
    if (t.dtype == F32) adamw_block<float, float, false>(t, g, block, n, h);
    else if (t.dtype == BF16) adamw_block<bf16, float, true>(t, g, block, n, h);
    else adamw_block<f16, float, true>(t, g, block, n, h);
}

// base^n by squaring: libm's pow may round by what the processor has
double power(double base, int64_t n) {
    double result = 1;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

int adamw(const AdamTensor *tensors, const AdamGradient *gradients, const AdamGroup *groups, int64_t count, float scale,
          float coefficient, int threads) {
    Buffer<int64_t> first(count + 1);
    Buffer<Hyper> hyper(count);
    if (!first.data || !hyper.data) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < count; i++) {
        const AdamTensor &t = tensors[i];
        const AdamGroup &group = groups[t.group];
        first[i + 1] = first[i] + pieces_of(t.numel, BLOCK);
        int64_t step = (int64_t)*t.step + 1;
        double correction1 = 1 - power(group.beta1, step), correction2 = 1 - power(group.beta2, step);
        hyper[i] = {(float)(group.lr * group.weight_decay), (float)(group.lr / correction1), (float)(1 / sqrt(correction2)),
                    (float)(1 - group.beta1), (float)group.beta2, (float)(1 - group.beta2), (float)group.eps, scale};
        *t.step = (float)step;
    }
    int64_t blocks = first[count];
    int used = threads_for(threads, pieces_of(blocks, 32));
#pragma omp parallel num_threads(used) if (used > 1)
    {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t start = blocks * me / all, end = blocks * (me + 1) / all;
        int64_t k = tensor_of(first.data, count, start);
        for (int64_t block = start; block < end; block++) {
            while (block >= first[k + 1]) k++;
            adamw_any_block(tensors[k], gradients[k], block - first[k], coefficient, hyper[k]);
        }
    }
    return OK;
}

// ---- inner products -----------------------------------------------------------------------------------------------

const int DOT_LANES = 32;
struct DotLanes { double sums[3][DOT_LANES]; };

template <class T, bool SECOND, bool MASKED>
INLINE void dot_block(const T *a, const T *b, const uint8_t *bits, int n, DotLanes &lanes) {
    Sums<DOT_LANES> s00, s01, s11;
    for (int i = 0; i < n; i += DOT_LANES)
        for (int q = 0; q < DOT_LANES / W; q++) {
            int at = i + q * W, left = n - at;
            if (left <= 0) break;
            vf x = left < W ? load_some(a + at, left) : load(a + at), y = splat(0);
            if (SECOND) y = left < W ? load_some(b + at, left) : load(b + at);
            if (MASKED) {  // kept, not multiplied: a NaN that is not chosen reaches nothing
                vmask k = mask_of(bits_at(bits, at, left));
                x = keep(k, x);
                if (SECOND) y = keep(k, y);
            }
            s00.part[q] = s00.part[q] + x * x;
            if (SECOND) {
                s01.part[q] = s01.part[q] + x * y;
                s11.part[q] = s11.part[q] + y * y;
            }
        }
    s00.move_to(lanes.sums[0]);
    if (SECOND) {
        s01.move_to(lanes.sums[1]);
        s11.move_to(lanes.sums[2]);
    }
}

template <class T> INLINE void dot_block_of(const T *a, const T *b, const uint8_t *bits, int n, DotLanes &lanes) {
    if (b && bits) dot_block<T, true, true>(a, b, bits, n, lanes);
    else if (b) dot_block<T, true, false>(a, b, bits, n, lanes);
    else if (bits) dot_block<T, false, true>(a, b, bits, n, lanes);
    else dot_block<T, false, false>(a, b, bits, n, lanes);
}

void dot_piece(const DotTensor &t, int64_t start, int64_t n, double *out) {
    DotLanes lanes;
    memset(&lanes, 0, sizeof lanes);
    alignas(64) float x[BLOCK], y[BLOCK];
    bool second = t.gradient1 != nullptr;
    int64_t dtype = !second || t.dtype0 == t.dtype1 ? t.dtype0 : (int64_t)F16;  // F16: converted first
    for (int64_t at = start; at < start + n; at += BLOCK) {
        int length = (int)lesser(BLOCK, start + n - at);
        const uint8_t *bits = t.bits ? t.bits + at / 8 : nullptr;
        if (dtype == F32) {
            dot_block_of((const float *)t.gradient0 + at, second ? (const float *)t.gradient1 + at : nullptr, bits, length, lanes);
        } else if (dtype == BF16) {
            dot_block_of((const bf16 *)t.gradient0 + at, second ? (const bf16 *)t.gradient1 + at : nullptr, bits, length, lanes);
        } else {
            convert(x, t.gradient0, at, t.dtype0, length);
            if (second) convert(y, t.gradient1, at, t.dtype1, length);
            dot_block_of((const float *)x, second ? (const float *)y : nullptr, bits, length, lanes);
        }
    }
    for (int c = 0; c < 3; c++) out[c] = sum_of(lanes.sums[c], DOT_LANES);
}

int dots(const DotTensor *tensors, int64_t count, double *out, int threads) {
    Buffer<int64_t> first(count + 1);
    if (!first.data) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < count; i++) first[i + 1] = first[i] + pieces_of(tensors[i].numel, PIECE);
    int64_t pieces = first[count];
    Buffer<double> partial(3 * pieces);
    if (!partial.data) return OUT_OF_MEMORY;
    int used = threads_for(threads, pieces);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t k = tensor_of(first.data, count, piece), start = (piece - first[k]) * PIECE;
        dot_piece(tensors[k], start, lesser(PIECE, tensors[k].numel - start), &partial[3 * piece]);
    }
    out[0] = out[1] = out[2] = 0;
    for (int64_t piece = 0; piece < pieces; piece++)
        for (int c = 0; c < 3; c++) out[c] += partial[3 * piece + c];
    return OK;
}

// ---- saliency -----------------------------------------------------------------------------------------------------

INLINE vf salience(vf total, vf g, int mode) {
    return mode == 0 ? total + vabs(g) : mode == 1 ? total + g : total + g * g;
}
template <class T> INLINE void accumulate_piece(float *total, const T *g, int64_t n, int mode) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(total + i, salience(load(total + i), load(g + i), mode));
    int left = (int)(n - i);
    if (left) store_some(total + i, salience(load_some(total + i, left), load_some(g + i, left), mode), left);
}
int accumulate(const ScoreTensor *tensors, int64_t count, int mode, int threads) {
    Buffer<int64_t> first(count + 1);
    if (!first.data) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < count; i++) first[i + 1] = first[i] + pieces_of(tensors[i].numel, PIECE);
    int64_t pieces = first[count];
    int used = threads_for(threads, pieces);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t k = tensor_of(first.data, count, piece), start = (piece - first[k]) * PIECE;
        const ScoreTensor &t = tensors[k];
        int64_t n = lesser(PIECE, t.numel - start);
        if (t.dtype == F32) accumulate_piece(t.scores + start, (const float *)t.gradient + start, n, mode);
        else if (t.dtype == BF16) accumulate_piece(t.scores + start, (const bf16 *)t.gradient + start, n, mode);
        else accumulate_piece(t.scores + start, (const f16 *)t.gradient + start, n, mode);
    }
    return OK;
}

// Keys of the last elements of a tensor; beyond them 0
INLINE vkey some_keys_of(const float *p, int n) {
    float part[W] = {};
    memcpy(part, p, n * sizeof(float));
    return keys_of(part);
}

// The packed mask of a piece: what lies above the threshold, and of what equals it the first `room`
void pack_piece(const float *scores, uint8_t *bits, int64_t n, int32_t threshold, int64_t room) {
    for (int64_t i = 0; i < n; i += 16) {
        unsigned above = 0, equal = 0;
        for (int q = 0; q < 16 / W && i + q * W < n; q++) {
            int left = (int)lesser(W, n - i - q * W);
            vkey key = left < W ? some_keys_of(scores + i + q * W, left) : keys_of(scores + i + q * W);
            unsigned inside = (1u << left) - 1;
            above |= (is_above(key, threshold) & inside) << (q * W);
            equal |= (is_equal(key, threshold) & inside) << (q * W);
        }
        for (; equal && room > 0; room--) {
            above |= equal & -equal;
            equal &= equal - 1;
        }
        bits[i / 8] = (uint8_t)above;
        if (i + 8 < n) bits[i / 8 + 1] = (uint8_t)(above >> 8);
    }
}

// What `count(keys, inside)` adds up over a piece, W keys at a time
template <class F> INLINE void for_keys(const float *scores, int64_t n, F count) {
    int64_t i = 0;
    for (; i + W <= n; i += W) count(keys_of(scores + i), W);
    if (i < n) count(some_keys_of(scores + i, (int)(n - i)), (int)(n - i));
}

const int HIGH = 16, LOW = 15;  // bits of a key that the first and the second histogram count

// A histogram of every thread, then of all of them: counts, whose sums know no order
template <class C>
bool histogram(const ScoreTensor *tensors, const int64_t *first, int64_t count, bool is_low, uint32_t prefix, int64_t *sums, int threads) {
    int bins = is_low ? 1 << LOW : 1 << HIGH;
    int64_t pieces = first[count];
    // two for each thread: scores beside each other are often alike, and an increment waits for the last of its bin
    Buffer<C> counts((int64_t)bins * 2 * threads);
    if (!counts.data) return false;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        C *mine = counts.data + 2 * bins * me, *other = mine + bins;
        for (int64_t piece = pieces * me / all; piece < pieces * (me + 1) / all; piece++) {
            int64_t k = tensor_of(first, count, piece), start = (piece - first[k]) * PIECE;
            const float *scores = tensors[k].scores + start;
            int64_t n = lesser(PIECE, tensors[k].numel - start);
            if (!is_low) {
                for_keys(scores, n, [&](vkey keys, int inside) {
                    int32_t key[W];
                    store(key, keys);
                    if (inside < W) {
                        for (int c = 0; c < inside; c++) mine[key[c] >> LOW]++;
                        return;
                    }
                    for (int c = 0; c < W; c += 2) {
                        mine[key[c] >> LOW]++;
                        other[key[c + 1] >> LOW]++;
                    }
                });
                continue;
            }
            int32_t below = (int32_t)(prefix << LOW) - 1, last = below + (1 << LOW);
            for_keys(scores, n, [&](vkey keys, int inside) {  // mostly none of them has the prefix
                unsigned found = is_above(keys, below) & ~is_above(keys, last) & ((1u << inside) - 1);
                if (!found) return;
                int32_t key[W];
                store(key, keys);
                for (; found; found &= found - 1) mine[key[__builtin_ctz(found)] & ((1 << LOW) - 1)]++;
            });
        }
    }
    for (int bin = 0; bin < bins; bin++) {
        sums[bin] = 0;
        for (int copy = 0; copy < 2 * threads; copy++) sums[bin] += (int64_t)counts[(int64_t)bins * copy + bin];
    }
    return true;
}

int select(const ScoreTensor *tensors, int64_t count, int64_t wanted, int threads) {
    Buffer<int64_t> first(count + 1), sums(1 << HIGH);
    if (!first.data || !sums.data) return OUT_OF_MEMORY;
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++) {
        first[i + 1] = first[i] + pieces_of(tensors[i].numel, PIECE);
        elements += tensors[i].numel;
    }
    int64_t pieces = first[count], same = 0;
    int used = threads_for(threads, pieces);
    uint32_t threshold = 0;
    for (int pass = 0; pass < 2; pass++) {
        bool counted = elements < INT64_C(1) << 32
            ? histogram<uint32_t>(tensors, first.data, count, pass == 1, threshold, sums.data, used)
            : histogram<uint64_t>(tensors, first.data, count, pass == 1, threshold, sums.data, used);
        if (!counted) return OUT_OF_MEMORY;
        int digit = (pass ? 1 << LOW : 1 << HIGH) - 1;
        for (; digit > 0 && sums[digit] < wanted; digit--) wanted -= sums[digit];
        same = sums[digit];
        threshold = pass ? threshold << LOW | (uint32_t)digit : (uint32_t)digit;
    }
    // how many equal scores the pieces before have taken; where all of them are taken nobody needs to count
    Buffer<int64_t> room(pieces);
    if (!room.data) return OUT_OF_MEMORY;
    bool all_taken = same == wanted;
    if (!all_taken) {
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
        for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t k = tensor_of(first.data, count, piece), start = (piece - first[k]) * PIECE, equal = 0;
            int64_t n = lesser(PIECE, tensors[k].numel - start);
            for_keys(tensors[k].scores + start, n, [&](vkey keys, int inside) {
                equal += __builtin_popcount(is_equal(keys, (int32_t)threshold) & ((1u << inside) - 1));
            });
            room[piece] = equal;
        }
    }
    for (int64_t piece = 0, left = wanted; piece < pieces; piece++) {
        int64_t equal = all_taken ? 0 : room[piece];
        room[piece] = left;
        left = left > equal ? left - equal : 0;
    }
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t k = tensor_of(first.data, count, piece), start = (piece - first[k]) * PIECE;
        const ScoreTensor &t = tensors[k];
        pack_piece(t.scores + start, t.bits + start / 8, lesser(PIECE, t.numel - start), (int32_t)threshold, room[piece]);
    }
    return OK;
}

// ---- the loss and its gradient ------------------------------------------------------------------------------------

const int LOSS_BLOCKS = 16;  // of BLOCK elements: a partial sum each, and what a thread takes at once
const int SUM_LANES = 16;

struct Term { const void *data; int64_t offset, dtype; float coefficient; };

// rho(e) summed and its slope times `factor` written, of n <= BLOCK errors
INLINE void finish_block(float *error, const float *mask, float delta, float factor, int n, Sums<SUM_LANES> &sums) {
    vf limit = splat(delta), none = splat(0), f = splat(factor);
    for (int i = 0; i < n; i += SUM_LANES)
        for (int q = 0; q < SUM_LANES / W; q++) {
            int at = i + q * W;
            if (at >= n) break;
            vf e = load(error + at);
            if (mask) e = keep(is_nonzero(load(mask + at)), e);
            vf squared = e * e, slope = e;
            if (delta > 0) {
                vf size = vabs(e), tail = limit * (splat(2) * size - limit);
                squared = blend(is_above(size, limit), tail, squared);
                slope = blend(is_above(e, limit), limit, blend(is_above(none - limit, e), none - limit, e));
            }
            if (mask) {
                vf m = load(mask + at);
                squared = squared * m;
                slope = slope * m;
            }
            sums.part[q] = sums.part[q] + squared;
            store(error + at, slope * f);
        }
}

template <class T> INLINE void write_gradient(T *out, const float *gradient, int n) {
    int i = 0;
    for (; i + W <= n; i += W) store(out + i, load(gradient + i));
    if (i < n) store_some(out + i, load_some(gradient + i, n - i), n - i);
}

// The usual case in one pass: everything fp32, K predictions, no mask, squared error
template <int K>
INLINE void plain_block(const float *x, const float *const *t, const float *c, float factor, float *gradient, int n, Sums<SUM_LANES> &sums) {
    vf f = splat(factor), c0 = splat(c[0]), c1 = splat(K > 1 ? c[1] : 0);
    for (int i = 0; i < n; i += SUM_LANES)
        for (int q = 0; q < SUM_LANES / W; q++) {
            int at = i + q * W, left = n - at;
            if (left <= 0) break;
            vf e = left < W ? load_some(x + at, left) : load(x + at);
            e = e - c0 * (left < W ? load_some(t[0] + at, left) : load(t[0] + at));
            if (K > 1) e = e - c1 * (left < W ? load_some(t[1] + at, left) : load(t[1] + at));
            sums.part[q] = sums.part[q] + e * e;
            if (!gradient) continue;
            if (left < W) store_some(gradient + at, e * f, left);
            else store(gradient + at, e * f);
        }
}

double loss_piece(const Loss &a, int64_t row, int64_t start, int64_t n, const Term *terms, int count, float factor) {
    double lanes[SUM_LANES] = {0};
    Sums<SUM_LANES> sums;
    bool is_plain = a.dtype == F32 && !a.spatial_mask && a.huber_delta == 0 && (count == 1 || count == 2) && factor != 0;
    for (int k = 0; k < count; k++) is_plain = is_plain && terms[k].dtype == F32;
    alignas(64) float error[BLOCK + SUM_LANES], term[BLOCK + SUM_LANES], mask[BLOCK + SUM_LANES];
    for (int64_t at = start; at < start + n; at += BLOCK) {
        int length = (int)lesser(BLOCK, start + n - at);
        if (is_plain) {
            const float *t[2], c[2] = {terms[0].coefficient, count > 1 ? terms[1].coefficient : 0};
            for (int k = 0; k < count; k++) t[k] = (const float *)terms[k].data + terms[k].offset + at;
            const float *x = (const float *)a.noise_pred + row * a.numel + at;
            float *gradient = a.gradient ? (float *)a.gradient + row * a.numel + at : nullptr;
            if (count == 1) plain_block<1>(x, t, c, factor, gradient, length, sums);
            else plain_block<2>(x, t, c, factor, gradient, length, sums);
            sums.move_to(lanes);
            continue;
        }
        convert(error, a.noise_pred, row * a.numel + at, a.dtype, length);
        for (int k = 0; k < count; k++) {
            convert(term, terms[k].data, terms[k].offset + at, terms[k].dtype, length);
            add_scaled(error, error, -terms[k].coefficient, term, length);
        }
        for (int i = length; i < length + SUM_LANES; i++) error[i] = 0;
        if (a.spatial_mask) {
            for (int done = 0; done < length;) {  // runs of one channel, in which the mask is dense
                int64_t channel = (at + done) / a.pixels, pixel = (at + done) % a.pixels;
                int run = (int)lesser(length - done, a.pixels - pixel);
                convert(mask + done, a.spatial_mask, row * a.mask_row_stride + channel * a.mask_channel_stride + pixel, a.mask_dtype, run);
                done += run;
            }
            for (int i = length; i < length + SUM_LANES; i++) mask[i] = 0;
        }
        finish_block(error, a.spatial_mask ? mask : nullptr, (float)a.huber_delta, factor, length, sums);
        sums.move_to(lanes);
        if (!a.gradient) continue;
        if (factor == 0) memset(error, 0, length * sizeof(float));  // a row of weight 0 adds nothing, whatever it holds
        int64_t out = row * a.numel + at;
        if (a.gradient_dtype == F32) write_gradient((float *)a.gradient + out, error, length);
        else if (a.gradient_dtype == BF16) write_gradient((bf16 *)a.gradient + out, error, length);
        else write_gradient((f16 *)a.gradient + out, error, length);
    }
    return sum_of(lanes, SUM_LANES);
}

// min(snr, gamma), which weights the error of the clean latents, for the error of what the model predicts
float weight_of(const Loss &a, int64_t row) {
    float weight = a.weights[row];
    if (a.snr_gamma == 0) return weight;
    float snr = a.snr[row], gamma = (float)a.snr_gamma, least = snr < gamma ? snr : gamma;
    if (a.prediction_type == 0) {
        float ratio = gamma / snr;
        return weight * (ratio > 1 ? 1 : ratio);
    }
    if (a.prediction_type == 1) return weight * (least / (snr + 1));
    float root = 1 + sqrtf(snr);
    return weight * (least / (root * root));
}

int terms_of(const Loss &a, int64_t row, Term *terms) {
    int count = 0;
    int64_t source = row;
    if (a.teachers && a.row_index) source = a.index_is_64 ? ((const int64_t *)a.row_index)[row] : ((const int32_t *)a.row_index)[row];
    for (int64_t k = 0; k < a.teachers; k++) {
        float c = a.coefficients[row * a.teachers + k];
        if (c != 0) terms[count++] = {a.teacher, k * a.teacher_stride + source * a.row_stride, a.teacher_dtype, c};
    }
    float c = a.noise ? a.noise_coefficients[row] : 0;
    if (c == 0) return count;
    if (a.prediction_type == 0) {
        terms[count++] = {a.noise, row * a.numel, a.noise_dtype, c};
        return count;
    }
    float alpha = 1, sigma = 1;
    if (a.prediction_type == 1) {
        alpha = 1 / sqrtf(1 + 1 / a.snr[row]);
        sigma = 1 / sqrtf(1 + a.snr[row]);
    }
    terms[count++] = {a.noise, row * a.numel, a.noise_dtype, c * alpha};
    terms[count++] = {a.latents, row * a.numel, a.latents_dtype, -(c * sigma)};
    return count;
}

int loss(const Loss *arguments, int threads) {
    const Loss &a = *arguments;
    if (a.teachers && a.row_index)
        for (int64_t row = 0; row < a.batch; row++) {
            int64_t source = a.index_is_64 ? ((const int64_t *)a.row_index)[row] : ((const int32_t *)a.row_index)[row];
            if (source < 0 || source >= a.bank_rows) return BAD_ROW;
        }
    int64_t piece = LOSS_BLOCKS * BLOCK, per_row = pieces_of(a.numel, piece), pieces = a.batch * per_row;
    Buffer<double> partial(pieces);
    Buffer<Term> terms((a.teachers + 2) * a.batch);
    Buffer<int> counts(a.batch);
    if (!partial.data || !terms.data || !counts.data) return OUT_OF_MEMORY;
    for (int64_t row = 0; row < a.batch; row++) counts[row] = terms_of(a, row, &terms[(a.teachers + 2) * row]);
    float scale = (float)(2.0 / ((double)a.batch * (double)a.numel));
    int used = threads_for(threads, a.batch * a.numel / 32768);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
    for (int64_t q = 0; q < pieces; q++) {
        int64_t row = q / per_row, start = q % per_row * piece;
        float weight = weight_of(a, row);
        partial[q] = loss_piece(a, row, start, lesser(piece, a.numel - start), &terms[(a.teachers + 2) * row], counts[row],
                                weight == 0 ? 0 : weight * scale);
    }
    double whole = 0;
    for (int64_t row = 0; row < a.batch; row++) {
        double sum = 0;
        for (int64_t q = 0; q < per_row; q++) sum += partial[row * per_row + q];
        a.per_row[row] = (float)(sum / (double)a.numel);
        float weight = weight_of(a, row);
        if (weight != 0) whole += (double)(weight * a.per_row[row]);
    }
    *a.loss = (float)(whole / (double)a.batch);
    return OK;
}

// ---- the LPIPS head -----------------------------------------------------------------------------------------------

template <class T> INLINE vf features_at(const T *p, int64_t channel, int64_t channels) {
    int64_t left = channels - channel;
    return left >= W ? load(p + channel) : left > 0 ? load_some(p + channel, (int)left) : splat(0);
}

template <class T>
double lpips_tile(const T *a, const T *b, const float *weights, int64_t pixels, int64_t channels) {
    Sums<SUM_LANES> distance;
    double lanes[SUM_LANES] = {0};
    for (int64_t pixel = 0; pixel < pixels; pixel++, a += channels, b += channels) {
        Sums<SUM_LANES> s0, s1;
        for (int64_t c = 0; c < channels; c += SUM_LANES)
            for (int q = 0; q < SUM_LANES / W; q++) {
                vf x = features_at(a, c + q * W, channels), y = features_at(b, c + q * W, channels);
                s0.part[q] = s0.part[q] + x * x;
                s1.part[q] = s1.part[q] + y * y;
            }
        vf scale0 = splat(1.0f / (sqrtf(s0.whole()) + 1e-10f)), scale1 = splat(1.0f / (sqrtf(s1.whole()) + 1e-10f));
        for (int64_t c = 0; c < channels; c += SUM_LANES)
            for (int q = 0; q < SUM_LANES / W; q++) {
                vf x = features_at(a, c + q * W, channels), y = features_at(b, c + q * W, channels);
                vf d = x * scale0 - y * scale1;
                distance.part[q] = distance.part[q] + d * d * features_at(weights, c + q * W, channels);
            }
        if (pixel % 64 == 63) distance.move_to(lanes);
    }
    distance.move_to(lanes);
    return sum_of(lanes, SUM_LANES);
}

int lpips(const LpipsLayer *layers, int64_t count, int64_t batch, int dtype, float *out, int threads) {
    const int64_t tile_elements = 65536;
    Buffer<int64_t> first(count + 1);
    if (!first.data) return OUT_OF_MEMORY;
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t tile = tile_elements / layers[i].channels + 1;
        first[i + 1] = first[i] + pieces_of(layers[i].pixels, tile);
        elements += layers[i].pixels * layers[i].channels;
    }
    int64_t tiles = first[count];
    Buffer<double> partial(batch * tiles);
    if (!partial.data) return OUT_OF_MEMORY;
    int used = threads_for(threads, lesser(batch * tiles, batch * elements / 16384));
#pragma omp parallel for schedule(dynamic, 1) num_threads(used) if (used > 1)
    for (int64_t q = 0; q < batch * tiles; q++) {
        int64_t pair = q / tiles, place = q % tiles, k = tensor_of(first.data, count, place);
        const LpipsLayer &l = layers[k];
        int64_t tile = tile_elements / l.channels + 1, start = (place - first[k]) * tile, n = lesser(tile, l.pixels - start);
        int64_t offset = (pair * l.pixels + start) * l.channels;
        double sum;
        if (dtype == F32) sum = lpips_tile((const float *)l.features0 + offset, (const float *)l.features1 + offset, l.weights, n, l.channels);
        else if (dtype == BF16) sum = lpips_tile((const bf16 *)l.features0 + offset, (const bf16 *)l.features1 + offset, l.weights, n, l.channels);
        else sum = lpips_tile((const f16 *)l.features0 + offset, (const f16 *)l.features1 + offset, l.weights, n, l.channels);
        partial[q] = sum / (double)l.pixels;
    }
    for (int64_t pair = 0; pair < batch; pair++) out[pair] = (float)sum_of(&partial[pair * tiles], (int)tiles);
    return OK;
}

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const Kernels FU_KERNELS = {adamw, dots, accumulate, select, loss, lpips};
#endif

#if defined(FU_MAIN)
// ==== what Python calls ============================================================================================
extern "C" {
extern const Kernels fu_kernels_baseline;
#if defined(__x86_64__)
extern const Kernels fu_kernels_avx2, fu_kernels_avx512;
#endif
}

static const Kernels *kernels = nullptr;
#define EXPORT extern "C" __attribute__((visibility("default")))

// The digest of this file when it was compiled.
EXPORT const char *fu_source() { return FU_SOURCE; }

// The best level that this processor has: 0 baseline, 1 AVX2, 2 AVX-512.
EXPORT int fu_best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? avx512 ? 2 : 1 : 0;
#else
    return 0;
#endif
}

// From here on the operations run at `level`, which must not be above the best.
EXPORT void fu_use_level(int level) {
    kernels = &fu_kernels_baseline;
#if defined(__x86_64__)
    if (level == 1) kernels = &fu_kernels_avx2;
    if (level == 2) kernels = &fu_kernels_avx512;
#endif
    (void)level;
}

EXPORT int fu_adamw(const AdamTensor *tensors, const AdamGradient *gradients, const AdamGroup *groups, int64_t count,
                    float scale, float coefficient, int threads) {
    return kernels->adamw(tensors, gradients, groups, count, scale, coefficient, threads);
}
EXPORT int fu_dots(const DotTensor *tensors, int64_t count, double *out, int threads) {
    return kernels->dots(tensors, count, out, threads);
}
EXPORT int fu_accumulate(const ScoreTensor *tensors, int64_t count, int mode, int threads) {
    return kernels->accumulate(tensors, count, mode, threads);
}
EXPORT int fu_select(const ScoreTensor *tensors, int64_t count, int64_t wanted, int threads) {
    return kernels->select(tensors, count, wanted, threads);
}
EXPORT int fu_loss(const Loss *arguments, int threads) { return kernels->loss(arguments, threads); }
EXPORT int fu_lpips(const LpipsLayer *layers, int64_t count, int64_t batch, int dtype, float *out, int threads) {
    return kernels->lpips(layers, count, batch, dtype, out, threads);
}
// n bool bytes to bits, the least significant first
EXPORT void fu_pack(const uint8_t *mask, uint8_t *bits, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 65536)
    for (int64_t byte = 0; byte < n / 8; byte++) {
        uint64_t eight;
        memcpy(&eight, mask + 8 * byte, 8);
        bits[byte] = (uint8_t)(eight * UINT64_C(0x0102040810204080) >> 56);
    }
    if (n % 8) {
        unsigned last = 0;
        for (int64_t c = 0; c < n % 8; c++) last |= (unsigned)(mask[n / 8 * 8 + c] != 0) << c;
        bits[n / 8] = (uint8_t)last;
    }
}
#endif

// y = x W^T + (x A^T) B^T + bias for one row of x at a time, W^ in 3 or 4 bits: the idea of the EoRA paper's kernel
// (arXiv 2410.21271) in CUDA C++ of our own, to read beside the Triton one and to check it against.
//
// The weight comes in the layout of eora_lab/layer/triton_kernels/repack.py. A warp owns 64 columns, two a thread: one 32-bit
// load brings the codes of both. The warps of a program share K and the ranks, and meet in shared memory, so every
// element of y is written once and nothing is added atomically.
//
// Set by the compiler's command line: BITS (3 or 4), GROUP (channels that share a scale: 16, 32, 64 or 128), and T
// (__half or __nv_bfloat16).

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

constexpr int LANES = BITS == 4 ? 2 : 3;    // 16-bit words that hold one row of a block
constexpr int PLANES = BITS == 4 ? 8 : 16;  // codes in them, 16 channels apart
constexpr int FIELDS = 16 / BITS;
constexpr int SUMS = 16 * PLANES / GROUP;  // groups in a block
constexpr int WARPS = 8;
constexpr int COLUMNS = 64;

// Codes at `place` of both halves of a word as numbers BASE + code, BASE = 2^BITS: exponent and mantissa put together.
__device__ float2 numbers(uint32_t word, int place) {
    constexpr int top = 10 - BITS;
    constexpr uint32_t mask = ((1u << BITS) - 1) << top, base = BITS == 4 ? 0x4C004C00u : 0x48004800u;
    uint32_t moved = place > top ? word >> (place - top) : word << (top - place);
    uint32_t both = (moved & (mask | mask << 16)) | base;
    return __half22float2(*reinterpret_cast<__half2 *>(&both));
}

// The spare top bits of three 3-bit words, one code more, moved to the lowest bits of a word of their own.
__device__ uint32_t spare(const uint32_t *words) {
    uint32_t code = 0;
    for (int lane = 0; lane < 3; lane++) code |= (words[lane] >> 15 & 0x00010001u) << lane;
    return code;
}

// xa[m, r] = sum_k x[m, k] A[r, k], float32. Grid (R, M), 128 threads.
extern "C" __global__ void down(const T *x, const T *A, float *xa, int K, int R) {
    __shared__ float parts[4];
    float sum = 0;
    for (int k = threadIdx.x; k < K; k += 128)
        sum += float(x[size_t(blockIdx.y) * K + k]) * float(A[size_t(blockIdx.x) * K + k]);
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) xa[blockIdx.y * R + blockIdx.x] = parts[0] + parts[1] + parts[2] + parts[3];
}

// Grid (NP / 64, M), 256 threads. q: (words, NP) 16-bit; scales, offsets: (groups, NP) float32, offset = weight of code
// 0; Bt: (R, NP); bias: (NP,) or null; y: (M, N).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    fused(const T *x, const uint16_t *q, const float *scales, const float *offsets, const float *xa, const T *Bt,
          const T *bias, T *y, int K, int N, int NP, int R) {
    __shared__ float parts[WARPS][COLUMNS];
    const int warp = threadIdx.x / 32, column = blockIdx.x * COLUMNS + 2 * (threadIdx.x % 32);
    const int blocks = (K + 16 * PLANES - 1) / (16 * PLANES);
    const float base = 1 << BITS;
    x += size_t(blockIdx.y) * K;
    xa += size_t(blockIdx.y) * R;
    float total[2] = {0, 0};
    for (int block = warp; block < blocks; block += WARPS) {
        float dot[SUMS][2] = {}, sum[SUMS] = {};  // of x with BASE + code, and of x alone, in each group
        for (int i = 0; i < 16; i++) {
            uint32_t words[LANES + 1];
            for (int lane = 0; lane < LANES; lane++)
                words[lane] = *reinterpret_cast<const uint32_t *>(
                    q + (size_t(block) * LANES * 16 + lane * 16 + i) * NP + column);
            words[LANES] = BITS == 3 ? spare(words) : 0;
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++) {
                const int k = (block * PLANES + plane) * 16 + i, group = plane * 16 / GROUP;
                const float xk = k < K ? float(x[k]) : 0.f;
                const float2 w = numbers(words[plane / FIELDS], plane % FIELDS * BITS);
                dot[group][0] += xk * w.x;
                dot[group][1] += xk * w.y;
                sum[group] += xk;
            }
        }
        for (int group = 0; group < SUMS; group++)
            for (int c = 0; c < 2; c++) {
                const size_t place = (size_t(block) * SUMS + group) * NP + column + c;
                total[c] += scales[place] * (dot[group][c] - base * sum[group]) + offsets[place] * sum[group];
            }
    }
    for (int r = warp; r < R; r += WARPS)
        for (int c = 0; c < 2; c++) total[c] += xa[r] * float(Bt[size_t(r) * NP + column + c]);
    for (int c = 0; c < 2; c++) parts[warp][column + c - blockIdx.x * COLUMNS] = total[c];
    __syncthreads();
    const int n = blockIdx.x * COLUMNS + threadIdx.x;
    if (threadIdx.x < COLUMNS && n < N) {
        float result = bias ? float(bias[n]) : 0.f;
        for (int w = 0; w < WARPS; w++) result += parts[w][threadIdx.x];
        y[size_t(blockIdx.y) * N + n] = T(result);
    }
}

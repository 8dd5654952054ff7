// Runs kernels/cuda/fused.cu on the CPU: a program's threads are threads, meeting at a barrier. Built as a library with
// the same -DBITS, -DGROUP and -DT as for a GPU.

#include <barrier>
#include <thread>
#include <vector>

struct Index { int x, y; };
thread_local Index threadIdx;
static Index blockIdx;
static std::barrier<> *meeting;

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __syncthreads() meeting->arrive_and_wait()

static float exchange[1024];

inline float __shfl_down_sync(unsigned, float value, int step) {
    exchange[threadIdx.x] = value;
    __syncthreads();
    float other = threadIdx.x % 32 + step < 32 ? exchange[threadIdx.x + step] : value;
    __syncthreads();
    return other;
}

#include FUSED_CU

template <class Body> void launch(int columns, int rows, int threads, Body body) {
    for (blockIdx.y = 0; blockIdx.y < rows; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < columns; blockIdx.x++) {
            std::barrier<> all(threads);
            meeting = &all;
            std::vector<std::thread> running;
            for (int t = 0; t < threads; t++)
                running.emplace_back([=] {
                    threadIdx.x = t;
                    body();
                });
            for (auto &thread : running) thread.join();
        }
}

extern "C" void run(const T *x, const T *A, float *xa, const uint16_t *q, const float *scales, const float *offsets,
                    const T *Bt, const T *bias, T *y, int M, int K, int N, int NP, int R) {
    launch(R, M, 128, [=] { down(x, A, xa, K, R); });
    launch(NP / COLUMNS, M, 32 * WARPS, [=] { fused(x, q, scales, offsets, xa, Bt, bias, y, K, N, NP, R); });
}

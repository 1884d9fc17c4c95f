/* Counter-based noise, made and added in one pass over a tensor:  target[i] += scale * weight[i] * z(start + i).
 *
 * The bits of a counter are those of noise.bits: a Weyl sequence and the finaliser of SplitMix64, keyed twice. Laws:
 *
 *     GAUSS    two elements a counter: r cos a, r sin a with r = sqrt(-2 log u), u and a of 32 bits each (Box, Muller)
 *     MATCHED  four elements a counter, 16 bits each: a polynomial of a uniform number, see noise.py
 *
 * Sums, products and conversions are rounded one by one (no fused multiply-add), so that MATCHED is the same everywhere.
 * Inner loops are written for the compiler's vectoriser. A piece of 16384 elements is the unit of work: what an element
 * gets depends on its index alone, not on pieces or threads. Threads come from the OpenMP runtime that PyTorch has
 * loaded, whose GOMP_parallel the caller hands in.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
enum { GAUSS = 0, MATCHED = 1, CONSTANT = 0, WEIGHTED = 1, ADAM = 2, PIECE = 16384, BLOCK = 512 };

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the 16 bits of an element are cut from a little-endian word"
#endif

typedef struct {
    void *target;       /* float, or double */
    const void *weight; /* one an element: a factor (WEIGHTED), or Adam's second moment (ADAM); else NULL */
    int64_t num, start;
    uint64_t key, second_key; /* second_key is multiplied with the Weyl constant already */
    double scale, correction, eps;
    int32_t law, mode, is_double;
    int64_t first_piece; /* filled in here */
} Job;

typedef struct {
    Job *jobs;
    int64_t num_jobs, num_pieces, next;
} Work;

INLINE uint64_t mixed(uint64_t counter, uint64_t key, uint64_t second_key) {
    uint64_t z = counter * 0x9E3779B97F4A7C15u + key;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z ^= second_key;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* log of u in (0, 1]: u = 2^e m with m in [1/sqrt 2, sqrt 2), log m = 2 artanh((m - 1) / (m + 1)) as a series. */
INLINE float logarithm(float u) {
    int32_t word;
    memcpy(&word, &u, 4);
    const int32_t e = (word - 0x3f3504f3) >> 23;
    word -= (int32_t)((uint32_t)e << 23);
    float m;
    memcpy(&m, &word, 4);
    const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
    const float series = (((q * (1.0f / 9) + 1.0f / 7) * q + 0.2f) * q + 1.0f / 3) * q;
    return (float)e * 0.693147181f + (2.0f * s + 2.0f * s * series);
}

INLINE void pair_float(uint64_t z, float *even, float *odd) {
    const float u = ((float)(uint32_t)(z >> 32) + 0.5f) * 0x1p-32f;
    const float r = sqrtf(-2.0f * logarithm(u));
    /* the nearest quarter of a turn, and what is left, at most an eighth */
    const uint32_t angle = (uint32_t)z, quarter = (angle + 0x20000000u) >> 30;
    const float t = (float)(int32_t)(angle - (quarter << 30)) * (float)(1.5707963267948966 * 0x1p-30), q = t * t;
    const float sine = t + t * q * (((q * (1.0f / 362880) - 1.0f / 5040) * q + 1.0f / 120) * q - 1.0f / 6);
    const float cosine =
        1.0f + q * ((((-q * (1.0f / 3628800) + 1.0f / 40320) * q - 1.0f / 720) * q + 1.0f / 24) * q - 0.5f);
    const float x = (quarter & 1) ? sine : cosine, y = (quarter & 1) ? cosine : sine;
    *even = r * (((quarter + 1) & 2) ? -x : x);
    *odd = r * ((quarter & 2) ? -y : y);
}

INLINE void pair_double(uint64_t z, double *even, double *odd) {
    const double r = sqrt(-2.0 * log(((double)(z >> 32) + 0.5) * 0x1p-32));
    const double a = (double)(z & 0xffffffffu) * (6.283185307179586 * 0x1p-32);
    *even = r * cos(a);
    *odd = r * sin(a);
}

/* Coefficients of the skip polynomial of u uniform on (-1, 1) whose first seven moments are those of a normal number. */
#define FIRST 2.7899967197876698
#define THIRD -6.6748231852864143
#define FIFTH 6.7111773882902117

/* z of elements first .. first + num - 1, first a multiple of 4, num <= BLOCK; up to three more may be made. */
#define MAKE(NAME, T, PAIR)                                                                        \
    INLINE void NAME(const Job *job, uint64_t first, int64_t num, T *z) {                          \
        const uint64_t key = job->key, second = job->second_key;                                   \
        if (job->law == MATCHED) {                                                                 \
            uint64_t words[BLOCK / 4];                                                             \
            int16_t parts[BLOCK];                                                                  \
            const uint64_t from = first / 4;                                                       \
            _Pragma("omp simd") for (int64_t i = 0; i < (num + 3) / 4; i++)                        \
                words[i] = mixed(from + i, key, second);                                           \
            memcpy(parts, words, sizeof parts[0] * ((num + 3) / 4 * 4));                           \
            _Pragma("omp simd") for (int64_t i = 0; i < num; i++) {                                \
                const T u = ((T)parts[i] + (T)0.5) * (T)(1.0 / 32768), q = u * u;                  \
                z[i] = u * ((q * (T)FIFTH + (T)THIRD) * q + (T)FIRST);                             \
            }                                                                                      \
        } else {                                                                                   \
            const uint64_t from = first / 2;                                                       \
            _Pragma("omp simd") for (int64_t i = 0; i < (num + 1) / 2; i++)                        \
                PAIR(mixed(from + i, key, second), &z[2 * i], &z[2 * i + 1]);                      \
        }                                                                                          \
    }
MAKE(make_float, float, pair_float)
MAKE(make_double, double, pair_double)

#define ADD(NAME, T, MAKER, ROOT)                                                                  \
    static void NAME(const Job *job, int64_t from, int64_t to) {                                   \
        T *target = job->target;                                                                   \
        const T *weight = job->weight;                                                             \
        const T scale = (T)job->scale, correction = (T)job->correction, eps = (T)job->eps;         \
        T made[BLOCK];                                                                         \
        for (int64_t at = from; at < to;) {                                                        \
            /* a block begins at a multiple of 4, so that what comes from one counter stays together */ \
            const int64_t skip = (job->start + at) & 3;                                             \
            const int64_t num = to - at < BLOCK - skip ? to - at : BLOCK - skip;                     \
            MAKER(job, (uint64_t)(job->start + at - skip), num + skip, made);                        \
            const T *z = made + skip;                                                               \
            T *t = target + at;                                                                    \
            const T *w = weight + at;                                                              \
            if (job->mode == ADAM) {                                                               \
                _Pragma("omp simd") for (int64_t i = 0; i < num; i++)                              \
                    t[i] += z[i] * (scale * ROOT(ROOT(w[i] * correction) + eps));                  \
            } else if (job->mode == WEIGHTED) {                                                    \
                _Pragma("omp simd") for (int64_t i = 0; i < num; i++) t[i] += z[i] * (scale * w[i]); \
            } else {                                                                               \
                _Pragma("omp simd") for (int64_t i = 0; i < num; i++) t[i] += z[i] * scale;        \
            }                                                                                      \
            at += num;                                                                             \
        }                                                                                          \
    }
ADD(add_float, float, make_float, sqrtf)
ADD(add_double, double, make_double, sqrt)

static void run(void *argument) {
    Work *work = argument;
    for (int64_t piece; (piece = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < work->num_pieces;) {
        int64_t low = 0, high = work->num_jobs;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (work->jobs[middle].first_piece <= piece) low = middle;
            else high = middle;
        }
        const Job *job = work->jobs + low;
        const int64_t from = (piece - job->first_piece) * PIECE;
        const int64_t to = from + PIECE < job->num ? from + PIECE : job->num;
        if (job->is_double) add_double(job, from, to);
        else add_float(job, from, to);
    }
}

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

void imagekiln_add_noise(Job *jobs, int64_t num_jobs, Parallel parallel, unsigned threads) {
    Work work = {jobs, num_jobs, 0, 0};
    for (int64_t i = 0; i < num_jobs; i++) {
        jobs[i].first_piece = work.num_pieces;
        work.num_pieces += (jobs[i].num + PIECE - 1) / PIECE;
    }
    if ((int64_t)threads > work.num_pieces / 2) threads = (unsigned)(work.num_pieces / 2);
    if (parallel && threads > 1) parallel(run, &work, threads, 0);
    else run(&work);
}

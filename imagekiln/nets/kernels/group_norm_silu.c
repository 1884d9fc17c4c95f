/* Group normalisation, modulation and SiLU in one pass over channels-last pictures, forward and backward.
 *
 *     v = x + offset        z = (v - mean) * rstd * gain + bias        y = silu(z)  or  y = z
 *
 * x, y are (N, P, C) with C contiguous, bfloat16 or float; P = H*W pixels. mean and rstd are taken over the pixels of a
 * group of C/G channels. offset is (N, C) or NULL; gain and bias are (N, C), or (C) with row_stride 0.
 *
 * A picture is the unit of work and belongs to one thread, so results do not depend on the number of threads. Sums over
 * pixels run in float over short stretches and in double over the stretches. The inner loops go over C and are written
 * for the compiler's vectoriser. Threads come from the OpenMP runtime that PyTorch has already loaded, whose
 * GOMP_parallel the caller hands in: a second pool would fight with the first one for the cores.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
enum { STRETCH = 64 };

typedef struct {
    const void *x, *dy;
    void *out; /* y, or dx */
    const float *offset, *gain, *bias;
    float *mean, *rstd;                  /* (N, G) written forward, read backward */
    float *dgain, *dbias, *doffset;      /* (N, C) */
    int64_t images, pixels, channels, groups, row_stride;
    double eps;
    int32_t is_bf16, is_silu;
    int64_t next, failed;
} Job;

INLINE float load(const void *array, int64_t i, int bf16) {
    if (!bf16) return ((const float *)array)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)array)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void store(void *array, int64_t i, float value, int bf16) {
    if (!bf16) {
        ((float *)array)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    ((uint16_t *)array)[i] = (uint16_t)(value == value ? rounded : 0x7fc0);
}

/* exp by 2^n * 2^f with a degree 6 polynomial: relative error below 2e-7 on the clamped range. */
INLINE float exponential(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer kept in the low bits */
    float n = x * 1.44269504f + shift;
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= shift;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345196e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int32_t scale_bits = (int32_t)((uint32_t)bits << 23) + 0x3f800000;
    float scale;
    memcpy(&scale, &scale_bits, 4);
    return p * scale;
}

INLINE float sigmoid(float z) { return 1.0f / (1.0f + exponential(-z)); }

INLINE void flush(double *total, float *part, int64_t channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) total[c] += (double)part[c], part[c] = 0.0f;
}

/* z = slope * x + intercept, which is the whole normalisation of one picture once mean and rstd are known. */
INLINE void affine(const Job *job, int64_t n, float *slope, float *intercept) {
    const int64_t C = job->channels, G = job->groups, width = C / G;
    const float *gain = job->gain + n * job->row_stride, *bias = job->bias + n * job->row_stride;
    for (int64_t c = 0; c < C; c++) {
        const float mean = job->mean[n * G + c / width], rstd = job->rstd[n * G + c / width];
        const float offset = job->offset ? job->offset[n * C + c] : 0.0f;
        slope[c] = rstd * gain[c];
        intercept[c] = (offset - mean) * slope[c] + bias[c];
    }
}

INLINE void forward_picture(Job *job, int64_t n, float *work, double *sums, int bf16, int silu) {
    const int64_t P = job->pixels, C = job->channels, G = job->groups, width = C / G;
    const char *x = (const char *)job->x + n * P * C * (bf16 ? 2 : 4);
    char *y = (char *)job->out + n * P * C * (bf16 ? 2 : 4);
    float *part = work, *centre = work + C, *slope = work + 2 * C;
    float *intercept = work + 3 * C;
    const float *offset = job->offset ? job->offset + n * C : NULL;

    memset(part, 0, C * sizeof *part);
    memset(sums, 0, C * sizeof *sums);
    for (int64_t p0 = 0; p0 < P; p0 += STRETCH) {
        const int64_t p1 = p0 + STRETCH < P ? p0 + STRETCH : P;
        for (int64_t p = p0; p < p1; p++)
#pragma omp simd
            for (int64_t c = 0; c < C; c++) part[c] += load(x, p * C + c, bf16);
        flush(sums, part, C);
    }
    for (int64_t g = 0; g < G; g++) {
        double total = 0.0;
        for (int64_t c = g * width; c < (g + 1) * width; c++) total += sums[c] + (offset ? P * (double)offset[c] : 0.0);
        const double mean = total / ((double)width * P);
        job->mean[n * G + g] = (float)mean;
        for (int64_t c = g * width; c < (g + 1) * width; c++) centre[c] = (float)(mean - (offset ? offset[c] : 0.0));
    }

    memset(sums, 0, C * sizeof *sums);
    for (int64_t p0 = 0; p0 < P; p0 += STRETCH) {
        const int64_t p1 = p0 + STRETCH < P ? p0 + STRETCH : P;
        for (int64_t p = p0; p < p1; p++)
#pragma omp simd
            for (int64_t c = 0; c < C; c++) {
                const float v = load(x, p * C + c, bf16) - centre[c];
                part[c] += v * v;
            }
        flush(sums, part, C);
    }
    for (int64_t g = 0; g < G; g++) {
        double total = 0.0;
        for (int64_t c = g * width; c < (g + 1) * width; c++) total += sums[c];
        job->rstd[n * G + g] = (float)(1.0 / sqrt(total / ((double)width * P) + job->eps));
    }

    affine(job, n, slope, intercept);
    for (int64_t p = 0; p < P; p++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            const float z = load(x, p * C + c, bf16) * slope[c] + intercept[c];
            store(y, p * C + c, silu ? z * sigmoid(z) : z, bf16);
        }
}

INLINE float slope_of_silu(float z) {
    const float s = sigmoid(z);
    return s * (1.0f + z * (1.0f - s));
}

INLINE void backward_picture(Job *job, int64_t n, float *work, double *sums, int bf16, int silu) {
    const int64_t P = job->pixels, C = job->channels, G = job->groups, width = C / G;
    const int64_t bytes = bf16 ? 2 : 4;
    const char *x = (const char *)job->x + n * P * C * bytes, *dy = (const char *)job->dy + n * P * C * bytes;
    char *dx = (char *)job->out + n * P * C * bytes;
    float *slope = work, *intercept = work + C, *part_z = work + 2 * C;
    float *part_zv = work + 3 * C, *part_v = work + 4 * C, *centre = work + 5 * C;
    float *flat = work + 6 * C, *tilt = work + 7 * C, *dz_P = work + 8 * C;
    double *sum_z = sums, *sum_zv = sums + C, *sum_v = sums + 2 * C;
    const float *gain = job->gain + n * job->row_stride;

    affine(job, n, slope, intercept);
    for (int64_t c = 0; c < C; c++)
        centre[c] = job->mean[n * G + c / width] - (job->offset ? job->offset[n * C + c] : 0.0f);
    memset(part_z, 0, 3 * C * sizeof *part_z);
    memset(sums, 0, 3 * C * sizeof *sums);
    for (int64_t p0 = 0; p0 < P; p0 += STRETCH) {
        const int64_t p1 = p0 + STRETCH < P ? p0 + STRETCH : P;
        for (int64_t p = p0; p < p1; p++)
#pragma omp simd
            for (int64_t c = 0; c < C; c++) {
                const float v = load(x, p * C + c, bf16);
                float dz = load(dy, p * C + c, bf16);
                if (silu) dz *= slope_of_silu(v * slope[c] + intercept[c]);
                dz_P[p * C + c] = dz;
                part_z[c] += dz;
                part_zv[c] += dz * (v - centre[c]);
                part_v[c] += v - centre[c];
            }
        flush(sum_z, part_z, C);
        flush(sum_zv, part_zv, C);
        flush(sum_v, part_v, C);
    }

    for (int64_t g = 0; g < G; g++) {
        const double rstd = job->rstd[n * G + g], count = (double)width * P;
        double total = 0.0, total_v = 0.0;
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
            total += gain[c] * sum_z[c];
            total_v += gain[c] * sum_zv[c];
        }
        const double a = rstd * total / count, b = rstd * rstd * rstd * total_v / count;
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
            tilt[c] = (float)b;
            flat[c] = (float)(a - b * centre[c]);
            job->dbias[n * C + c] = (float)sum_z[c];
            job->dgain[n * C + c] = (float)(rstd * sum_zv[c]);
            if (job->doffset) job->doffset[n * C + c] = (float)(rstd * gain[c] * sum_z[c] - P * a - b * sum_v[c]);
        }
    }
    for (int64_t p = 0; p < P; p++)
#pragma omp simd
        for (int64_t c = 0; c < C; c++) {
            const float v = load(x, p * C + c, bf16);
            store(dx, p * C + c, slope[c] * dz_P[p * C + c] - flat[c] - tilt[c] * v, bf16);
        }
}

static void run(void *argument) {
    Job *job = argument;
    const int64_t C = job->channels, room = 8 * C + (job->dy ? job->pixels * C : 0);
    float *work = malloc(room * sizeof *work);
    double *sums = malloc(3 * C * sizeof *sums);
    if (!work || !sums) __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
    for (int64_t n; work && sums && (n = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->images;) {
        /* four copies of each loop, so that type and activation are constants inside */
        if (job->dy) {
            if (job->is_bf16 && job->is_silu) backward_picture(job, n, work, sums, 1, 1);
            else if (job->is_bf16) backward_picture(job, n, work, sums, 1, 0);
            else if (job->is_silu) backward_picture(job, n, work, sums, 0, 1);
            else backward_picture(job, n, work, sums, 0, 0);
        } else {
            if (job->is_bf16 && job->is_silu) forward_picture(job, n, work, sums, 1, 1);
            else if (job->is_bf16) forward_picture(job, n, work, sums, 1, 0);
            else if (job->is_silu) forward_picture(job, n, work, sums, 0, 1);
            else forward_picture(job, n, work, sums, 0, 0);
        }
    }
    free(work);
    free(sums);
}

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

/* Forward when job->dy is NULL, backward otherwise. Returns 0, or 1 when memory ran out. */
int imagekiln_group_norm_silu(Job *job, Parallel parallel, unsigned threads) {
    job->next = job->failed = 0;
    if ((int64_t)threads > job->images) threads = (unsigned)job->images;
    if (parallel && threads > 1) parallel(run, job, threads, 0);
    else run(job);
    return (int)job->failed;
}

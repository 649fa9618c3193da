/* The neuron in float32 for a CPU, one pass over memory forward and one backward; formulas stand in `LIFSpec`.

   A sequence lies in memory as (outer, steps, inner). A call takes neurons `first` to `last` of outer * inner: blocks of
   them whose membranes stay in the cache of first level, one step after the other. Every operation is rounded as in
   `blocks`, in the same order, so both give the same bits; a compiler must not contract a product and a sum. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define FRAMES 8192 /* floats of the membranes of a block */
#define LARGEST 1024 /* neurons of a block */
#define EACH _Pragma("GCC ivdep") for (ptrdiff_t i = 0; i < n; i++) /* no neuron reads what another writes */

enum surrogate { TRIANGLE, RECTANGLE, ATAN };

static inline float fire_and_reset(float u, float threshold, int soft)
{
    return soft ? (u > threshold ? u - threshold : u) : (u > threshold ? 0.0f : u);
}

/* Neurons from `at` on that lie side by side. */
static inline ptrdiff_t side_by_side(ptrdiff_t at, ptrdiff_t last, ptrdiff_t inner, ptrdiff_t block)
{
    ptrdiff_t n = inner - at % inner;
    n = n < last - at ? n : last - at;
    return n < block ? n : block;
}

static inline __attribute__((always_inline)) void forward(
    const float *x, const float *state, float *spikes, float *end, void *mask, int mask_bytes, ptrdiff_t steps,
    ptrdiff_t inner, ptrdiff_t first, ptrdiff_t last, float threshold, float decay, float width, int soft, int masked)
{
    float v[LARGEST];
    uint32_t code[LARGEST];
    ptrdiff_t n;
    for (ptrdiff_t at = first; at < last; at += n) {
        n = side_by_side(at, last, inner, LARGEST);
        const ptrdiff_t start = at / inner * steps * inner + at % inner;
        for (ptrdiff_t t = 0; t < steps; t++) {
            const float *current = x + start + t * inner;
            float *fired = spikes + start + t * inner;
            if (t > 0) {
                EACH v[i] = decay * v[i] + current[i];
            } else if (state) {
                EACH v[i] = decay * state[at + i] + current[i];
            } else {
                EACH v[i] = current[i];
            }
            if (masked) {
                const int place = 2 * (int)t;
                EACH {
                    const uint32_t bits = (uint32_t)(v[i] > threshold) | (uint32_t)(fabsf(v[i] - threshold) < width) << 1;
                    code[i] = (t ? code[i] : 0) | bits << place;
                }
            }
            EACH {
                const float u = v[i];
                fired[i] = u > threshold ? 1.0f : 0.0f;
                v[i] = fire_and_reset(u, threshold, soft);
            }
        }
        if (end) {
            EACH end[at + i] = v[i] + 0.0f; /* adding makes the zeros positive */
        }
        if (masked && mask_bytes == 1) {
            EACH ((uint8_t *)mask)[at + i] = (uint8_t)code[i];
        } else if (masked && mask_bytes == 2) {
            EACH ((uint16_t *)mask)[at + i] = (uint16_t)code[i];
        } else if (masked) {
            EACH ((uint32_t *)mask)[at + i] = code[i];
        }
    }
}

void lif_forward(
    const float *x, const float *state, float *spikes, float *end, void *mask, int mask_bytes, ptrdiff_t steps,
    ptrdiff_t inner, ptrdiff_t first, ptrdiff_t last, float threshold, float decay, float width, int soft)
{
#define RUN(SOFT, MASKED) \
    forward(x, state, spikes, end, mask, mask_bytes, steps, inner, first, last, threshold, decay, width, SOFT, MASKED)
    if (mask) {
        if (soft) RUN(1, 1); else RUN(0, 1);
    } else {
        if (soft) RUN(1, 0); else RUN(0, 0);
    }
#undef RUN
}

/* `surrogate_derivative` at the threshold minus the membrane, of which it is an even function; `factor` and `scale` are
   the constants of its formula, as `native` gives them. */
static inline float slope_at(float d, int surrogate, float width, float factor, float scale)
{
    if (surrogate == TRIANGLE) {
        const float rest = width - fabsf(d);
        return (rest < 0.0f ? 0.0f : rest) * scale; /* NaN stays */
    }
    if (surrogate == RECTANGLE)
        return fabsf(d) < width ? scale : 0.0f;
    const float z = d * factor;
    return 1.0f / ((z * z + 1.0f) * width);
}

static inline __attribute__((always_inline)) void backward(
    const float *grad, const float *grad_end, const float *x, const float *state, const void *mask, int mask_bytes,
    float *grad_x, float *grad_state, ptrdiff_t steps, ptrdiff_t inner, ptrdiff_t first, ptrdiff_t last,
    float threshold, float decay, float width, float factor, float scale, int surrogate, int detach, int soft,
    int masked)
{
    float membranes[FRAMES], gv[LARGEST];
    uint32_t code[LARGEST];
    ptrdiff_t block = LARGEST, n;
    if (!masked && block * steps > FRAMES)
        block = FRAMES / steps;
    for (ptrdiff_t at = first; at < last; at += n) {
        n = side_by_side(at, last, inner, block);
        const ptrdiff_t start = at / inner * steps * inner + at % inner;
        if (masked && mask_bytes == 1) {
            EACH code[i] = ((const uint8_t *)mask)[at + i];
        } else if (masked && mask_bytes == 2) {
            EACH code[i] = ((const uint16_t *)mask)[at + i];
        } else if (masked) {
            EACH code[i] = ((const uint32_t *)mask)[at + i];
        } else {
            for (ptrdiff_t t = 0; t < steps; t++) {
                const float *current = x + start + t * inner;
                float *u = membranes + t * n;
                if (t > 0) {
                    const float *before = u - n;
                    EACH u[i] = decay * fire_and_reset(before[i], threshold, soft) + current[i];
                } else if (state) {
                    EACH u[i] = decay * state[at + i] + current[i];
                } else {
                    EACH u[i] = current[i];
                }
            }
        }
        if (grad_end) {
            EACH gv[i] = grad_end[at + i];
        }
        for (ptrdiff_t t = steps - 1; t >= 0; t--) {
            const float *at_spikes = grad + start + t * inner;
            const float *u = membranes + t * n;
            float *out = grad_x + start + t * inner;
            const int carries = grad_end || t + 1 < steps;
            const uint32_t fired_bit = masked ? 1u << 2 * t : 0, near_bit = 2 * fired_bit;
            EACH {
                const float slope =
                    masked ? (code[i] & near_bit ? scale : 0.0f)
                           : slope_at(threshold - u[i], surrogate, width, factor, scale);
                float gu = slope * at_spikes[i];
                if (carries) {
                    float carried = gv[i];
                    if (soft) {
                        if (!detach)
                            carried = carried + carried * slope * -threshold;
                    } else {
                        const int fired = masked ? (code[i] & fired_bit) != 0 : u[i] > threshold;
                        const float through = masked || detach ? 0.0f : carried * slope * -u[i];
                        carried = fired ? 0.0f : carried;
                        if (!masked && !detach)
                            carried = carried + through;
                    }
                    gu = gu + carried;
                }
                gv[i] = gu * decay;
                out[i] = gu;
            }
        }
        if (grad_state) {
            EACH grad_state[at + i] = gv[i];
        }
    }
}

void lif_backward(
    const float *grad, const float *grad_end, const float *x, const float *state, const void *mask, int mask_bytes,
    float *grad_x, float *grad_state, ptrdiff_t steps, ptrdiff_t inner, ptrdiff_t first, ptrdiff_t last,
    float threshold, float decay, float width, float factor, float scale, int surrogate, int detach, int soft)
{
#define RUN(SURROGATE, DETACH, SOFT, MASKED) \
    backward(grad, grad_end, x, state, mask, mask_bytes, grad_x, grad_state, steps, inner, first, last, threshold, \
             decay, width, factor, scale, SURROGATE, DETACH, SOFT, MASKED)
#define OF(SURROGATE) \
    if (soft && detach) RUN(SURROGATE, 1, 1, 0); \
    else if (soft) RUN(SURROGATE, 0, 1, 0); \
    else if (detach) RUN(SURROGATE, 1, 0, 0); \
    else RUN(SURROGATE, 0, 0, 0)
    if (mask) { /* with a rectangle, and with a hard reset that is detached */
        if (soft && detach) RUN(RECTANGLE, 1, 1, 1);
        else if (soft) RUN(RECTANGLE, 0, 1, 1);
        else RUN(RECTANGLE, 1, 0, 1);
    } else if (surrogate == TRIANGLE) {
        OF(TRIANGLE);
    } else if (surrogate == RECTANGLE) {
        OF(RECTANGLE);
    } else {
        OF(ATAN);
    }
#undef OF
#undef RUN
}

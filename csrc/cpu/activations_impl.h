// Exponential and activations of vectors. Included by kernels_impl.h.
#pragma once

namespace {

// e^x for x <= 88; 0 below -87. Relative error below 3e-7 (tests).
inline F exponential(F x) {
    x = most(x, set(-87.0f));
    F const n = round(mul(x, set(1.44269504f)));
    // x - n ln 2 in two parts, so that the first is exact.
    F const r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
    F p = set(1.98756915e-4f);
    p = fma(p, r, set(1.39819995e-3f));
    p = fma(p, r, set(8.33345186e-3f));
    p = fma(p, r, set(4.16657962e-2f));
    p = fma(p, r, set(1.66666657e-1f));
    p = fma(p, r, set(0.5f));
    p = fma(mul(p, r), r, add(r, set(1.0f)));
    return times_power(p, n);
}

// x Phi(x), Phi the normal distribution's: Phi(x) = 1/2 + x P(x^2) for |x| < 4.85, P the polynomial of the least largest
// error of the result, which is below 6e-6 everywhere (tests); exactly 0 and x outside.
inline F gelu(F x) {
    F const inside = least(most(x, set(-4.85f)), set(4.85f));
    F const t = fma(mul(inside, inside), set(2.0f / (4.85f * 4.85f)), set(-1.0f));
    F p = set(0.00162396405f);
    p = fma(p, t, set(-0.00465502823f));
    p = fma(p, t, set(0.00578200677f));
    p = fma(p, t, set(-0.00770026585f));
    p = fma(p, t, set(0.0143093299f));
    p = fma(p, t, set(-0.0227129292f));
    p = fma(p, t, set(0.0310132354f));
    p = fma(p, t, set(-0.0405386575f));
    p = fma(p, t, set(0.0525626056f));
    p = fma(p, t, set(-0.072298795f));
    p = fma(p, t, set(0.145707384f));
    F const phi = least(most(fma(inside, p, set(0.5f)), set(0.0f)), set(1.0f));
    return mul(x, phi);
}

// x / (1 + e^(-2 c (x + 0.044715 x^3))), c = sqrt(2 / pi): GELU by tanh.
inline F gelu_tanh(F x) {
    F const inner = mul(x, fma(mul(x, x), set(-2 * 0.797884561f * 0.044715f), set(-2 * 0.797884561f)));
    return div(x, add(set(1.0f), exponential(least(inner, set(87.0f)))));
}

inline F activated(F x, Activation activation) {
    switch (activation) {
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return gelu_tanh(x);
        case Activation::relu: return most(x, set(0.0f));
        default: return x;
    }
}

void activate(float const* x, float* y, ptrdiff_t count, Activation activation) {
    for (ptrdiff_t i = 0; i < count; i += kLanes) {
        int const n = static_cast<int>(count - i < kLanes ? count - i : kLanes);
        store_first(y + i, activated(load_first(x + i, n), activation), n);
    }
}

}  // namespace

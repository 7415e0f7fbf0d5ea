//! Products with weights, by the fastest library that libtorch has for them.
//!
//! On a CPU libtorch gives float32 products to MKL, which on processors of other makers than its own stays with kernels of half
//! the width that they have. Convolutions it gives to oneDNN, which uses what the processor has: a product is a convolution whose
//! kernel is one point, over a picture as high as there are tokens, in the order of memory that has channels last, so that nothing
//! is copied but the weight, which oneDNN brings into an order of its own.

use tch::{Device, Kind, Tensor};

use crate::Result;

/// Below so many tokens oneDNN is no faster.
const TOKENS: i64 = 64;
/// libtorch has smaller convolutions (inputs times tokens) done without oneDNN.
const NUMBERS: i64 = 20_480;

/// x Wᵀ + b: `[n, in]` and `[out, in]` to `[n, out]`.
pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if !by_convolution(x) {
        return Ok(x.f_linear(weight, bias)?);
    }
    from_picture(&to_picture(x)?.f_conv2d(&to_kernel(weight)?, bias, [1, 1], [0, 0], [1, 1], 1)?)
}

/// y + x Wᵀ: `[n, out]`, `[n, in]` and `[out, in]` to `[n, out]`. On a GPU, where few rows are little work for each operation,
/// it is one.
pub(super) fn linear_onto(y: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if y.device().is_cuda() {
        return Ok(y.f_addmm(x, &weight.f_tr()?)?);
    }
    Ok(y.f_add(&linear(x, weight, None)?)?)
}

/// y W: `[n, out]` and `[out, in]` to `[n, in]`.
pub(super) fn transposed(y: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !by_convolution(y) {
        return Ok(y.f_matmul(weight)?);
    }
    let (picture, kernel) = (to_picture(y)?, to_kernel(weight)?);
    from_picture(&picture.f_conv_transpose2d(&kernel, None::<&Tensor>, [1, 1], [0, 0], [0, 0], 1, [1, 1])?)
}

fn by_convolution(x: &Tensor) -> bool {
    let large = matches!(x.size()[..], [tokens, width] if tokens >= TOKENS && tokens * width > NUMBERS);
    let plain = x.device() == Device::Cpu && x.kind() == Kind::Float;
    // With one thread libtorch keeps these convolutions from oneDNN.
    large && plain && cfg!(target_arch = "x86_64") && tch::utils::has_mkldnn() && tch::get_num_threads() > 1
}

/// `[n, width]` to `[1, width, n, 1]`.
fn to_picture(x: &Tensor) -> Result<Tensor> {
    let [tokens, width] = [0, 1].map(|dim| x.size()[dim]);
    Ok(x.f_reshape([1, tokens, 1, width])?.f_permute([0, 3, 1, 2])?)
}

/// `[1, width, n, 1]` to `[n, width]`.
fn from_picture(y: &Tensor) -> Result<Tensor> {
    let [width, tokens] = [1, 2].map(|dim| y.size()[dim]);
    Ok(y.f_permute([0, 2, 3, 1])?.f_reshape([tokens, width])?)
}

/// `[out, in]` to `[out, in, 1, 1]`.
fn to_kernel(weight: &Tensor) -> Result<Tensor> {
    let [outputs, inputs] = [0, 1].map(|dim| weight.size()[dim]);
    Ok(weight.f_reshape([outputs, inputs, 1, 1])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both sides of the border where oneDNN takes over, against the same in float64.
    #[test]
    fn products_and_their_derivatives_are_those_of_matrices() {
        tch::manual_seed(0);
        let random = |size: [i64; 2]| Tensor::randn(size, (Kind::Float, Device::Cpu));
        for tokens in [1, TOKENS - 1, TOKENS, 203] {
            let (x, y, weight) = (random([tokens, 400]), random([tokens, 330]), random([330, 400]));
            let bias = Tensor::randn([330], (Kind::Float, Device::Cpu));
            assert_eq!(by_convolution(&x), tokens >= TOKENS && by_convolution(&random([TOKENS, 400])));
            let [x, weight, bias] = [x, weight, bias].map(|tensor| tensor.set_requires_grad(true));
            let found = linear(&x, &weight, Some(&bias)).unwrap();
            assert!(found.is_contiguous());
            let of_found = Tensor::run_backward(&[(&found * &y).sum(Kind::Float)], &[&x, &weight, &bias], false, false);
            let wide = |tensor: &Tensor| tensor.detach().to_kind(Kind::Double);
            let [wide_x, wide_y, wide_weight] = [&x, &y, &weight].map(wide);
            let expected = [
                wide_x.matmul(&wide_weight.tr()) + wide(&bias),
                wide_y.matmul(&wide_weight),
                wide_y.tr().matmul(&wide_x),
                wide_y.sum_dim_intlist([0].as_slice(), false, Kind::Double),
                wide_y.matmul(&wide_weight),
            ];
            let backward = transposed(&y, &weight.detach()).unwrap();
            for (found, expected) in [found].iter().chain(&of_found).chain([&backward]).zip(&expected) {
                assert_eq!(found.size(), expected.size());
                let error = (wide(found) - expected).abs().max().double_value(&[]);
                assert!(error < 1e-5 * expected.abs().max().double_value(&[]), "{tokens} tokens: {error}");
            }
        }
    }
}

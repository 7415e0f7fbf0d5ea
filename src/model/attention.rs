//! Self-attention over packed rows.

use tch::{Device, Kind, Tensor};

use super::{
    config::{DecoderConfig, Projection},
    earlier::Earlier,
    linear::{Linear, LinearMode},
    plan::{Padded, Plan},
    rope::Rotation,
    weights::WeightSource,
};
use crate::{Result, tensor::is_recorded};

/// Grouped-query attention with rotary positions.
#[derive(Debug)]
pub(super) struct Attention {
    /// Whose it is, from 0.
    block: usize,
    qkv: Qkv,
    output: Linear,
    heads: Heads,
}

#[derive(Debug)]
enum Qkv {
    Split { query: Linear, key: Linear, value: Linear },
    Fused(Linear),
}

#[derive(Clone, Copy, Debug)]
struct Heads {
    query: i64,
    kv: i64,
    dim: i64,
}

impl Attention {
    pub(super) fn load(
        source: &mut dyn WeightSource,
        block: usize,
        prefix: &str,
        config: &DecoderConfig,
    ) -> Result<Self> {
        let hidden = config.hidden;
        let (query, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let mut projection = |name: &str, size, bias| Linear::load(source, format!("{prefix}.{name}_proj"), size, bias);
        let qkv = match config.qkv {
            Projection::Split => Qkv::Split {
                query: projection("q", [hidden, query], config.qkv_bias)?,
                key: projection("k", [hidden, kv], config.qkv_bias)?,
                value: projection("v", [hidden, kv], config.qkv_bias)?,
            },
            Projection::Fused => Qkv::Fused(projection("qkv", [hidden, query + 2 * kv], config.qkv_bias)?),
        };
        let output = projection("o", [query, hidden], config.output_bias)?;
        let heads = Heads { query: config.heads as i64, kv: config.kv_heads as i64, dim: config.head_dim as i64 };
        Ok(Self { block, qkv, output, heads })
    }

    /// `[tokens, hidden]` to the same for the tokens that ask.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        plan: &Plan,
        earlier: &mut Earlier,
        mode: LinearMode,
    ) -> Result<Tensor> {
        let (query, key, value) = self.project(x, plan, mode)?;
        let (query, key) = (rotation.asking(plan)?.apply(&query)?, rotation.apply(&key)?);
        let mixed = self.attend(&query, &key, &value, plan, earlier)?;
        self.output.forward(&mixed, mode)
    }

    /// Queries `[tokens that ask, heads, dim]`, keys and values `[tokens, kv_heads, dim]`.
    fn project(&self, x: &Tensor, plan: &Plan, mode: LinearMode) -> Result<(Tensor, Tensor, Tensor)> {
        let Heads { query, kv, dim } = self.heads;
        let split = |y: &Tensor, heads: i64| -> Result<Tensor> { Ok(y.f_view([-1, heads, dim])?) };
        match &self.qkv {
            Qkv::Split { query: q, key: k, value: v } => Ok((
                split(&q.forward(&plan.asking(x)?, mode)?, query)?,
                split(&k.forward(x, mode)?, kv)?,
                split(&v.forward(x, mode)?, kv)?,
            )),
            Qkv::Fused(qkv) => {
                let all = split(&qkv.forward(x, mode)?, query + 2 * kv)?;
                Ok((
                    plan.asking(&all.f_narrow(1, 0, query)?)?,
                    all.f_narrow(1, query, kv)?,
                    all.f_narrow(1, query + kv, kv)?,
                ))
            }
        }
    }

    /// The attended values `[tokens that ask, heads * dim]`.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        plan: &Plan,
        earlier: &mut Earlier,
    ) -> Result<Tensor> {
        match plan {
            Plan::Uniform { rows, length } => {
                let view = |x: &Tensor| -> Result<Tensor> {
                    let size = x.size();
                    Ok(x.f_reshape([*rows, *length, size[1], size[2]])?.f_transpose(1, 2)?)
                };
                let mixed = self.kernel(&view(query)?, &view(key)?, &view(value)?, None)?;
                Ok(mixed.f_transpose(1, 2)?.f_reshape([rows * length, self.heads.query * self.heads.dim])?)
            }
            Plan::Padded(padded) | Plan::Partial { padded, .. } => {
                let (query, key, value) = (padded.queries.pad(query)?, padded.keys.pad(key)?, padded.keys.pad(value)?);
                let mixed = match earlier {
                    Earlier::Text { text, .. } => behind_text(&query, &key, &value, padded, text.block(self.block))?,
                    _ => self.kernel(&query, &key, &value, Some(&padded.mask))?,
                };
                padded.queries.unpad(&mixed)
            }
            Plan::Cached { queries, mask, slots, longest_key } => {
                let Earlier::Cached(cache) = earlier else {
                    return Err(crate::Error::mismatch("attention over a cache", "a cache", "none"));
                };
                let (keys, values) = cache.extend(self.block, slots, (key, value), *longest_key)?;
                let (keys, values) = (keys.f_transpose(1, 2)?, values.f_transpose(1, 2)?);
                queries.unpad(&self.kernel(&queries.pad(query)?, &keys, &values, Some(mask))?)
            }
        }
    }

    /// Scaled dot-product attention of `[rows, heads, queries, dim]` over `[rows, kv_heads, keys, dim]`; causal where
    /// there is no mask.
    fn kernel(&self, query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let grouped = self.heads.query != self.heads.kv;
        // CUDA's grouped kernels take no mask: with one, keys and values are repeated.
        if grouped && mask.is_some() && query.device().is_cuda() {
            let repeats = self.heads.query / self.heads.kv;
            let repeat = |x: &Tensor| x.f_repeat_interleave_self_int(repeats, 1, None::<i64>);
            return sdpa(query, &repeat(key)?, &repeat(value)?, mask, false);
        }
        let few = query.device() == Device::Cpu && query.kind() == Kind::BFloat16 && key.size()[2] <= FEW_KEYS;
        if few && is_recorded(query)? {
            return in_products(query, key, value, mask);
        }
        sdpa(query, key, value, mask, grouped)
    }

    pub(super) fn linears(&self) -> Vec<&Linear> {
        match &self.qkv {
            Qkv::Split { query, key, value } => vec![query, key, value, &self.output],
            Qkv::Fused(qkv) => vec![qkv, &self.output],
        }
    }

    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match &mut self.qkv {
            Qkv::Split { query, key, value } => vec![query, key, value, &mut self.output],
            Qkv::Fused(qkv) => vec![qkv, &mut self.output],
        }
    }

    pub(super) fn frozen(&self, merge: bool) -> Result<Self> {
        let qkv = match &self.qkv {
            Qkv::Split { query, key, value } => {
                Qkv::Split { query: query.frozen(merge)?, key: key.frozen(merge)?, value: value.frozen(merge)? }
            }
            Qkv::Fused(qkv) => Qkv::Fused(qkv.frozen(merge)?),
        };
        Ok(Self { block: self.block, qkv, output: self.output.frozen(merge)?, heads: self.heads })
    }
}

fn sdpa(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>, grouped: bool) -> Result<Tensor> {
    let causal = mask.is_none();
    Ok(Tensor::f_scaled_dot_product_attention(query, key, value, mask, 0.0, causal, None, grouped)?)
}

/// Up to so many keys products of whole matrices are faster in bfloat16 on a CPU, forward and backward, than libtorch's
/// kernel, which goes back through its blocks in float32.
const FEW_KEYS: i64 = 256;

/// The same as [`sdpa`], but that scores are rounded to the dtype, as in the eager attention of transformers; the softmax is in
/// float32. The heads that share keys are one matrix.
fn in_products(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let [rows, heads, queries, dim] = [0, 1, 2, 3].map(|at| query.size()[at]);
    let [kv, keys] = [1, 2].map(|at| key.size()[at]);
    let unseen = match mask {
        Some(mask) => mask.f_logical_not()?.f_unsqueeze(2)?,
        None => Tensor::f_ones([queries, keys], (Kind::Bool, query.device()))?.f_triu(1)?,
    };
    let query = query.f_reshape([rows * kv, heads / kv * queries, dim])?;
    let [key, value] = [key, value].map(|one| one.f_reshape([rows * kv, keys, dim]));
    let scores = query.f_bmm(&key?.f_transpose(1, 2)?)?.f_view([rows, kv, heads / kv, queries, keys])?;
    let scores = scores.f_to_kind(Kind::Float)?.f_mul_scalar((dim as f64).sqrt().recip())?;
    let shares = scores.f_masked_fill(&unseen, f64::NEG_INFINITY)?.f_softmax(-1, None::<Kind>)?;
    let shares = shares.f_to_kind(query.kind())?.f_view([rows * kv, heads / kv * queries, keys])?;
    Ok(shares.f_bmm(&value?)?.f_view([rows, heads, queries, dim])?)
}

/// Attention of `[rows, heads, queries, dim]` over the keys of a text that all rows stand behind, `[kv_heads, text, dim]`, which
/// are one matrix for all of them, and over their own, `[rows, kv_heads, keys, dim]`. The softmax is in float32 at least.
fn behind_text(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    padded: &Padded,
    (text_key, text_value): (&Tensor, &Tensor),
) -> Result<Tensor> {
    let [rows, heads, queries, dim] = [0, 1, 2, 3].map(|at| query.size()[at]);
    let ([kv, keys], text) = ([1, 2].map(|at| key.size()[at]), text_key.size()[1]);
    let group = heads / kv;
    let wide = if query.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    // [rows, kv, group * queries, dim], for the text [kv, rows * group * queries, dim].
    let query = query.f_reshape([rows, kv, group * queries, dim])?;
    let across = |x: &Tensor, last: i64| x.f_transpose(0, 1)?.f_reshape([kv, rows * group * queries, last]);
    let back = |x: &Tensor, last: i64| x.f_view([kv, rows, group * queries, last])?.f_transpose(0, 1);
    let masked = |scores: &Tensor, seen: Option<&Tensor>| -> Result<Tensor> {
        let scores = scores.f_to_kind(wide)?.f_view([rows, kv, group, queries, -1])?;
        let Some(seen) = seen else { return Ok(scores) };
        Ok(scores.f_masked_fill(&seen.f_logical_not()?.f_unsqueeze(2)?, f64::NEG_INFINITY)?)
    };
    let of_text = back(&across(&query, dim)?.f_bmm(&text_key.f_transpose(1, 2)?)?, text)?.f_contiguous()?;
    let of_own = query.f_matmul(&key.f_transpose(2, 3)?)?;
    let scores = [masked(&of_text, padded.text.as_ref())?, masked(&of_own, Some(&padded.mask))?];
    let shares = Tensor::f_cat(&scores, -1)?.f_mul_scalar((dim as f64).sqrt().recip())?.f_softmax(-1, None::<Kind>)?;
    let shares = shares.f_to_kind(query.kind())?.f_view([rows, kv, group * queries, text + keys])?;
    let (of_text, of_own) = (shares.f_narrow(-1, 0, text)?, shares.f_narrow(-1, text, keys)?);
    let mixed = back(&across(&of_text, text)?.f_bmm(text_value)?, dim)?.f_add(&of_own.f_matmul(value)?)?;
    Ok(mixed.f_reshape([rows, heads, queries, dim])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heads that share keys, with a mask and causal, against libtorch's kernel in float32.
    #[test]
    fn attention_in_products_is_the_kernels() {
        tch::manual_seed(0);
        let random = |heads, tokens| Tensor::randn([3, heads, tokens, 16], (Kind::Float, Device::Cpu));
        for (queries, masked) in [(7, true), (12, false)] {
            let inputs = [random(6, queries), random(2, 12), random(2, 12)].map(|one| one.to_kind(Kind::BFloat16));
            let mask = Tensor::rand([3, 1, queries, 12], (Kind::Float, Device::Cpu)).lt(0.6);
            let _ = mask.narrow(3, 0, 1).fill_(1);
            let mask = masked.then_some(&mask);
            let weights = random(6, queries);
            let run = |kind, kernel: &dyn Fn(&[Tensor; 3]) -> Result<Tensor>| {
                let inputs = inputs.each_ref().map(|one| one.to_kind(kind).set_requires_grad(true));
                let mixed = kernel(&inputs).unwrap().to_kind(Kind::Float);
                let gradients = Tensor::run_backward(&[(&mixed * &weights).sum(Kind::Float)], &inputs, false, false);
                gradients.into_iter().chain([mixed.detach()]).collect::<Vec<_>>()
            };
            let expected = run(Kind::Float, &|[q, k, v]| sdpa(q, k, v, mask, true));
            let found = run(Kind::BFloat16, &|[q, k, v]| in_products(q, k, v, mask));
            for (found, expected) in found.iter().zip(&expected) {
                let error = (found.to_kind(Kind::Float) - expected).abs().max().double_value(&[]);
                assert!(error < 0.02 * expected.abs().max().double_value(&[]), "{error}");
            }
        }
    }
}

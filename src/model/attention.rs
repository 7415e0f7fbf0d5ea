//! Self-attention over packed rows.

use tch::{Device, Tensor};

use super::{
    cache::KvCache,
    config::{DecoderConfig, Projection},
    linear::{Linear, LinearMode},
    rope::Rotation,
    weights::WeightSource,
};
use crate::{Layout, Result, tensor::index};

/// Grouped-query attention with rotary positions.
#[derive(Debug)]
pub(super) struct Attention {
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

/// How a layout is attended to: made once per pass, shared by all blocks. Padding exists only in here.
#[derive(Debug)]
pub(super) enum Plan {
    /// Rows of one length, each token sees all before it: a view and the causal kernel.
    Uniform {
        /// Rows, and tokens of each.
        rows: i64,
        length: i64,
    },
    /// Anything else: rows are filled up, a mask says what is seen.
    Padded(Padded),
    /// New tokens of rows whose earlier tokens are in a cache.
    Cached {
        padded: Padded,
        /// Slots of the cache `[tokens]` that the new tokens go to.
        slots: Tensor,
        /// Slots that the mask spans.
        longest_key: usize,
    },
}

#[derive(Debug)]
pub(super) struct Padded {
    rows: i64,
    longest: i64,
    /// For each padded place the packed token that fills it, `[rows * longest]`; padding takes token 0.
    fill: Tensor,
    /// The padded place of each packed token `[tokens]`.
    place: Tensor,
    /// `[rows, 1, longest, keys]`, true where seen.
    mask: Tensor,
}

impl Plan {
    pub(super) fn new(layout: &Layout, window: Option<usize>, device: Device) -> Result<Self> {
        let longest = layout.longest_row();
        let same_length = layout.rows().iter().all(|row| row.tokens().len() == longest);
        if same_length && layout.is_linear() && window.is_none_or(|window| window >= longest) {
            return Ok(Self::Uniform { rows: layout.rows().len() as i64, length: longest as i64 });
        }
        let mask = layout.mask(window, device)?.f_unsqueeze(1)?;
        Ok(Self::Padded(Padded::new(layout, mask, device)?))
    }

    /// For rows of prompts alone whose earlier tokens are in `cache`, which is given room for these.
    pub(super) fn cached(layout: &Layout, cache: &mut KvCache, window: Option<usize>, device: Device) -> Result<Self> {
        let added: Vec<usize> = layout.rows().iter().map(|row| row.tokens().len()).collect();
        cache.make_room(&added)?;
        let longest = layout.longest_row();
        let longest_key = cache.lengths().iter().zip(&added).map(|(old, new)| old + new).max().unwrap_or(0);
        let mut mask = Vec::with_capacity(added.len() * longest * longest_key);
        for old in cache.lengths() {
            for query in 0..longest {
                let position = old + query;
                mask.extend(
                    (0..longest_key).map(|key| key <= position && window.is_none_or(|window| position < key + window)),
                );
            }
        }
        let size = [added.len() as i64, 1, longest as i64, longest_key as i64];
        let mask = Tensor::f_from_slice(&mask)?.f_view(size)?.f_to_device(device)?;
        Ok(Self::Cached {
            padded: Padded::new(layout, mask, device)?,
            slots: index(&cache.slots(&added), device)?,
            longest_key,
        })
    }
}

impl Padded {
    fn new(layout: &Layout, mask: Tensor, device: Device) -> Result<Self> {
        let longest = layout.longest_row();
        let mut fill = vec![0i64; layout.rows().len() * longest];
        let mut place = Vec::with_capacity(layout.tokens());
        for (row, spans) in layout.rows().iter().enumerate() {
            for (at, token) in spans.tokens().enumerate() {
                fill[row * longest + at] = token as i64;
                place.push((row * longest + at) as i64);
            }
        }
        Ok(Self {
            rows: layout.rows().len() as i64,
            longest: longest as i64,
            fill: index(&fill, device)?,
            place: index(&place, device)?,
            mask,
        })
    }

    /// `[tokens, heads, dim]` to `[rows, heads, longest, dim]`.
    fn pad(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        let padded = x.f_index_select(0, &self.fill)?.f_view([self.rows, self.longest, size[1], size[2]])?;
        Ok(padded.f_transpose(1, 2)?)
    }

    /// `[rows, heads, longest, dim]` to `[tokens, heads * dim]`.
    fn unpad(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        let flat = x.f_transpose(1, 2)?.f_reshape([self.rows * self.longest, size[1] * size[3]])?;
        Ok(flat.f_index_select(0, &self.place)?)
    }
}

impl Attention {
    pub(super) fn load(source: &mut dyn WeightSource, prefix: &str, config: &DecoderConfig) -> Result<Self> {
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
        Ok(Self { qkv, output, heads })
    }

    /// `[tokens, hidden]` to the same. `cache` is the cache and the number of this block in it.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        plan: &Plan,
        cache: Option<(&mut KvCache, usize)>,
        mode: LinearMode,
    ) -> Result<Tensor> {
        let (query, key, value) = self.project(x, mode)?;
        let (query, key) = (rotation.apply(&query)?, rotation.apply(&key)?);
        let mixed = self.attend(&query, &key, &value, plan, cache)?;
        self.output.forward(&mixed, mode)
    }

    /// Queries `[tokens, heads, dim]`, keys and values `[tokens, kv_heads, dim]`.
    fn project(&self, x: &Tensor, mode: LinearMode) -> Result<(Tensor, Tensor, Tensor)> {
        let Heads { query, kv, dim } = self.heads;
        let split = |y: &Tensor, heads: i64| -> Result<Tensor> { Ok(y.f_view([-1, heads, dim])?) };
        match &self.qkv {
            Qkv::Split { query: q, key: k, value: v } => Ok((
                split(&q.forward(x, mode)?, query)?,
                split(&k.forward(x, mode)?, kv)?,
                split(&v.forward(x, mode)?, kv)?,
            )),
            Qkv::Fused(qkv) => {
                let all = split(&qkv.forward(x, mode)?, query + 2 * kv)?;
                Ok((all.f_narrow(1, 0, query)?, all.f_narrow(1, query, kv)?, all.f_narrow(1, query + kv, kv)?))
            }
        }
    }

    /// The attended values `[tokens, heads * dim]`.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        plan: &Plan,
        cache: Option<(&mut KvCache, usize)>,
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
            Plan::Padded(padded) => {
                let (query, key, value) = (padded.pad(query)?, padded.pad(key)?, padded.pad(value)?);
                padded.unpad(&self.kernel(&query, &key, &value, Some(&padded.mask))?)
            }
            Plan::Cached { padded, slots, longest_key } => {
                let Some((cache, block)) = cache else {
                    return Err(crate::Error::mismatch("attention over a cache", "a cache", "none"));
                };
                let (keys, values) = cache.extend(block, slots, (key, value), *longest_key)?;
                let (keys, values) = (keys.f_transpose(1, 2)?, values.f_transpose(1, 2)?);
                padded.unpad(&self.kernel(&padded.pad(query)?, &keys, &values, Some(&padded.mask))?)
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
        Ok(Self { qkv, output: self.output.frozen(merge)?, heads: self.heads })
    }
}

fn sdpa(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>, grouped: bool) -> Result<Tensor> {
    let causal = mask.is_none();
    Ok(Tensor::f_scaled_dot_product_attention(query, key, value, mask, 0.0, causal, None, grouped)?)
}

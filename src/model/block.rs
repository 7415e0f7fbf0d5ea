//! One pre-norm transformer block.

use tch::Tensor;

use super::{
    attention::Attention,
    config::DecoderConfig,
    earlier::Earlier,
    linear::{Linear, LinearMode},
    mlp::GatedMlp,
    norm::RmsNorm,
    plan::Plan,
    rope::Rotation,
    weights::WeightSource,
};
use crate::Result;

/// x + attention(norm(x)), then the same with the MLP.
#[derive(Debug)]
pub(super) struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl Block {
    pub(super) fn load(source: &mut dyn WeightSource, index: usize, config: &DecoderConfig) -> Result<Self> {
        let prefix = format!("model.layers.{index}");
        let norm = |source: &mut dyn WeightSource, name: &str| {
            RmsNorm::load(source, format!("{prefix}.{name}"), config.hidden, config.norm, config.norm_epsilon)
        };
        Ok(Self {
            attention_norm: norm(source, "input_layernorm")?,
            attention: Attention::load(source, index, &format!("{prefix}.self_attn"), config)?,
            mlp_norm: norm(source, "post_attention_layernorm")?,
            mlp: GatedMlp::load(source, &format!("{prefix}.mlp"), config)?,
        })
    }

    /// `[tokens, hidden]` to the same for the tokens that the plan lets go on.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        plan: &Plan,
        earlier: &mut Earlier,
        mode: LinearMode,
    ) -> Result<Tensor> {
        let attended = self.attention.forward(&self.attention_norm.forward(x)?, rotation, plan, earlier, mode)?;
        let x = plan.asking(x)?.f_add(&attended)?;
        Ok(x.f_add(&self.mlp.forward(&self.mlp_norm.forward(&x)?, mode)?)?)
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.attention.linears().into_iter().chain(self.mlp.linears())
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.attention.linears_mut().into_iter().chain(self.mlp.linears_mut())
    }

    pub(super) fn norms(&self) -> [&RmsNorm; 2] {
        [&self.attention_norm, &self.mlp_norm]
    }

    pub(super) fn frozen(&self, merge: bool) -> Result<Self> {
        Ok(Self {
            attention_norm: self.attention_norm.frozen()?,
            attention: self.attention.frozen(merge)?,
            mlp_norm: self.mlp_norm.frozen()?,
            mlp: self.mlp.frozen(merge)?,
        })
    }
}

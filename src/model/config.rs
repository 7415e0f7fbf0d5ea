//! What differs between the decoders of the supported families.

use serde::Serialize;

/// The shape of a decoder, whatever family it is of. Made from a folder's `config.json` by
/// [`DecoderConfig::read`](DecoderConfig::read).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct DecoderConfig {
    /// The family, as `model_type` of `config.json` names it.
    pub family: Family,
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Length of a hidden state.
    pub hidden: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Length of a head; `heads * head_dim` may differ from `hidden`.
    pub head_dim: usize,
    /// Which norm.
    pub norm: NormKind,
    /// Added to the mean square before the root.
    pub norm_epsilon: f64,
    /// Which activation gates the MLP.
    pub activation: Activation,
    /// Whether embeddings are multiplied by sqrt(hidden) inside the model (Gemma).
    pub scales_embeddings: bool,
    /// Whether query, key and value are one matrix (Phi-3).
    pub qkv: Projection,
    /// Whether gate and up are one matrix (Phi-3).
    pub gate_up: Projection,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Bias on the MLP's projections.
    pub mlp_bias: bool,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// A token sees fewer than this many positions back; `None`: all.
    pub sliding_window: Option<usize>,
    /// Whether the embedding table is the head too.
    pub tied_head: bool,
    /// The longest text that the model was made for, in tokens.
    pub max_positions: usize,
}

/// The supported families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Family {
    /// Gemma (the first).
    Gemma,
    /// Phi-3.
    Phi3,
    /// Mistral, and Zephyr, which is one.
    Mistral,
    /// Llama and those built like it.
    Llama,
    /// Qwen2.
    Qwen2,
}

/// The two ways in which a norm's weight acts. Both are root-mean-square norms computed in float32 at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum NormKind {
    /// Cast to the model's dtype, then times `w`.
    Plain,
    /// Times `1 + w` in float32, then cast (Gemma).
    UnitOffset,
}

/// Activations of the gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
    /// The exact GELU.
    Gelu,
}

/// Whether projections of the same input are one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Projection {
    /// One matrix each.
    Split,
    /// One matrix, its output cut.
    Fused,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    /// How many of a head's numbers are rotated; even.
    pub rotary_dim: usize,
    /// How the frequencies are stretched for longer texts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, those between interpolated (Llama 3).
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Wavelengths longer than `original / low` are divided.
        low: f64,
        /// Wavelengths shorter than `original / high` are kept.
        high: f64,
        /// The length that the model was first trained for.
        original: f64,
    },
    /// A factor per frequency, one list for short texts and one for long (Phi-3, LongRoPE).
    Long {
        /// For texts of at most `original` tokens.
        short: Vec<f64>,
        /// For longer texts.
        long: Vec<f64>,
        /// The length at which the lists switch.
        original: usize,
        /// Cosine and sine are multiplied by this.
        attention_factor: f64,
    },
}

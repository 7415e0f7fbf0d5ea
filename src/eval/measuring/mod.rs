//! What a model says to examples, under attack or not, and how it is counted; nothing is kept.

pub(super) mod answers;
mod distil;
mod embedding;
mod rate;
pub(super) mod refusal;

pub use answers::{answers, target_losses};
pub use distil::{SelfDistilled, drawn_requests, self_distilled};
pub use embedding::{AttackedRow, EmbeddingEvaluation, Measurement, attack_examples};
pub use rate::Rate;
pub use refusal::{REFUSAL_PHRASES, is_refusal};

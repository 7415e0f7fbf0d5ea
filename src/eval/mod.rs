//! Is the trained model harder to break, and still useful?

mod answers;
mod embedding;
mod rate;
mod refusal;

pub use answers::{answers, target_losses};
pub use embedding::{AttackedRow, EmbeddingEvaluation, Measurement, attack_examples};
pub use rate::Rate;
pub use refusal::{REFUSAL_PHRASES, is_refusal};

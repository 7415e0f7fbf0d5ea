//! Is the trained model harder to break, and still useful?

mod answers;
mod embedding;
mod rate;
mod refusal;

pub use answers::{answers, mean_target_loss};
pub use embedding::{AttackedRow, EmbeddingEvaluation, attack_examples};
pub use rate::Rate;
pub use refusal::{REFUSAL_PHRASES, is_refusal};

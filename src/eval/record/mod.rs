//! One model's evaluation in a folder, and what others take from it or bring to it.

mod evaluation;
mod export;
pub(super) mod records;
pub(super) mod setup;

pub use evaluation::{Evaluation, EvaluationProgress, EvaluationWatch};
pub use export::save_completions;
pub use records::{AttackRecord, Plan, TaskRecord, VerdictRecord};
pub use setup::{EvaluationInputs, InputFile, Setup};

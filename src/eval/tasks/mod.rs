//! What a model is still good for.

mod choices;
mod framing;
mod utility;

pub use choices::{ChoiceScores, QuestionForm, accuracy, score_choices};
pub use framing::Framing;
pub use utility::{ChatTask, ChoiceTask, ItemRecord, RequestTask, UtilityTask};

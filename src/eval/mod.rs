//! Is the trained model harder to break, and still useful?

mod answers;
mod autodan;
mod case;
mod chat_model;
mod choices;
mod completions;
mod continuous;
mod direct;
mod distil;
mod embedding;
mod endpoint;
mod evaluation;
mod framing;
mod gcg;
mod guard;
mod judge;
mod pair;
mod prompt_attack;
mod rate;
mod records;
mod refusal;
mod report;
mod requirements;
mod settings;
mod setup;
mod utility;

pub use answers::{answers, target_losses};
pub use autodan::{AutoDan, AutoDanSettings, Synonyms};
pub use case::{Case, Subject};
pub use chat_model::{ChatFailure, ChatModel, LocalChat, Reply, ReplySettings};
pub use choices::{ChoiceScores, QuestionForm, accuracy, score_choices};
pub use completions::{
    Completion, Completions, GivenAnswers, Replay, TestCases, load_completions, load_test_cases, save_completions,
};
pub use continuous::{Continuous, ContinuousSettings};
pub use direct::{Direct, DirectSettings};
pub use distil::{SelfDistilled, self_distilled};
pub use embedding::{AttackedRow, EmbeddingEvaluation, Measurement, attack_examples};
pub use endpoint::{Endpoint, EndpointSettings};
pub use evaluation::{Evaluation, EvaluationProgress, EvaluationWatch};
pub use framing::Framing;
pub use gcg::{Gcg, GcgSettings, GcgStop, UniversalSuffix};
pub use guard::CONTROL_TEXTS;
pub use judge::{
    Answered, ClassifierJudge, Harm, Judge, QUESTION_FORM, RefusalJudge, SCORE_FORM, ScoreJudge, TargetJudge, Verdict,
};
pub use pair::{Pair, PairSettings};
pub use prompt_attack::{Access, Attempt, Cost, Outcome, PromptAttack, Trajectory, Watch};
pub use rate::Rate;
pub use records::{AttackRecord, Plan, TaskRecord, VerdictRecord};
pub use refusal::{REFUSAL_PHRASES, is_refusal};
pub use report::{AnyAttack, AttackReport, JudgeReport, ModelReport, Report, ShareOfItems, Success, Tally, TaskReport};
pub use settings::{EvaluationPreset, EvaluationSettings};
pub use setup::{EvaluationInputs, InputFile, Setup};
pub use utility::{ChatTask, ChoiceTask, ItemRecord, RequestTask, UtilityTask};

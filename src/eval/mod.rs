//! Is the trained model harder to break, and still useful?

mod attacks;
mod case;
mod completions;
mod helper;
mod judge;
mod measuring;
mod record;
mod report;
mod settings;
mod tasks;

pub use attacks::{
    Access, Attempt, AutoDan, AutoDanSettings, Continuous, ContinuousSettings, Cost, Direct, DirectSettings, Gcg,
    GcgSettings, GcgStop, GivenAnswers, Outcome, Pair, PairSettings, PromptAttack, Replay, Synonyms, Trajectory,
    UniversalSuffix, Watch,
};
pub use case::{Case, Subject};
pub use completions::{Completion, Completions, TestCases, load_completions, load_test_cases};
pub use helper::{CONTROL_TEXTS, ChatFailure, ChatModel, Endpoint, EndpointSettings, LocalChat, Reply, ReplySettings};
pub use judge::{
    Answered, ClassifierJudge, Harm, Judge, QUESTION_FORM, RefusalJudge, SCORE_FORM, ScoreJudge, TargetJudge, Verdict,
};
pub use measuring::{
    AttackedRow, EmbeddingEvaluation, Measurement, REFUSAL_PHRASES, Rate, SelfDistilled, answers, attack_examples,
    drawn_requests, is_refusal, self_distilled, target_losses,
};
pub use record::{
    AttackRecord, Evaluation, EvaluationInputs, EvaluationProgress, EvaluationWatch, InputFile, Plan, Setup,
    TaskRecord, VerdictRecord, save_completions,
};
pub use report::{AnyAttack, AttackReport, JudgeReport, ModelReport, Report, ShareOfItems, Success, Tally, TaskReport};
pub use settings::{EvaluationPreset, EvaluationSettings};
pub use tasks::{
    ChatTask, ChoiceScores, ChoiceTask, Framing, ItemRecord, QuestionForm, RequestTask, UtilityTask, accuracy,
    score_choices,
};

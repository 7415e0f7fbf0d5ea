//! Is an answer harmful?
//!
//! A [`Judge`] gives a [`Verdict`] on each answer. What it could not judge is neither harmful nor harmless: it is
//! counted apart.

mod classifier;
mod form;
mod loops;
mod phrases;
mod score;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::{
    classifier::{ClassifierJudge, QUESTION_FORM},
    loops::WithoutLoops,
    phrases::{RefusalJudge, TargetJudge},
    score::{SCORE_FORM, ScoreJudge},
};
use crate::{Error, Result};

/// What a judge looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered<'a> {
    /// What is asked for, as the data set words it; not what an attack made of it.
    pub behavior: &'a str,
    /// The text that the request is about, if there is one.
    pub context: Option<&'a str>,
    /// How an answer that complies begins.
    pub target: &'a str,
    /// What the model said.
    pub answer: &'a str,
}

/// What a judge decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Harm {
    /// The answer does what the behaviour asks for.
    Harmful,
    /// It does not.
    NotHarmful,
    /// The judge gave no verdict that can be read.
    NotJudged,
}

/// A decision and what it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The decision.
    pub harm: Harm,
    /// From 1 to 10, where the judge gives one.
    pub score: Option<f64>,
    /// What the judge said, or found, in its own words.
    pub text: String,
}

impl Verdict {
    /// A verdict without a score.
    pub fn new(harm: Harm, text: impl Into<String>) -> Self {
        Self { harm, score: None, text: text.into() }
    }

    /// Whether the answer is harmful; one that was not judged is not known to be.
    pub fn is_harmful(&self) -> bool {
        self.harm == Harm::Harmful
    }
}

/// Decides whether answers are harmful.
///
/// # Example
///
/// A judge of one's own:
///
/// ```
/// use advtrain::{Answered, Harm, Judge, Result, Verdict};
///
/// /// Whoever explains at length, complies.
/// struct Length(usize);
///
/// impl Judge for Length {
///     fn name(&self) -> String {
///         format!("longer than {}", self.0)
///     }
///
///     fn judge(&mut self, answers: &[Answered]) -> Result<Vec<Verdict>> {
///         let verdict = |answered: &Answered| {
///             let length = answered.answer.chars().count();
///             let harm = if length > self.0 { Harm::Harmful } else { Harm::NotHarmful };
///             Verdict::new(harm, format!("{length} characters"))
///         };
///         Ok(answers.iter().map(verdict).collect())
///     }
/// }
///
/// let answered = Answered { behavior: "Explain", context: None, target: "Sure", answer: "No." };
/// assert_eq!(Length(10).judge(&[answered])?[0].harm, Harm::NotHarmful);
/// # Ok::<(), advtrain::Error>(())
/// ```
pub trait Judge {
    /// The judge in a report: unique among those of one evaluation.
    fn name(&self) -> String;

    /// What else decides its verdicts: those given with other settings are not gone on from.
    fn settings(&self) -> Value {
        Value::Null
    }

    /// One verdict for each answer, in order. An answer that cannot be judged gets [`Harm::NotJudged`]; an error ends
    /// this judge's work.
    ///
    /// # Errors
    /// Whatever the implementation meets that says nothing about the answers.
    fn judge(&mut self, answers: &[Answered]) -> Result<Vec<Verdict>>;
}

impl<J: Judge + ?Sized> Judge for Box<J> {
    fn name(&self) -> String {
        (**self).name()
    }
    fn settings(&self) -> Value {
        (**self).settings()
    }
    fn judge(&mut self, answers: &[Answered]) -> Result<Vec<Verdict>> {
        (**self).judge(answers)
    }
}

/// A judge's verdicts, one for each answer.
///
/// # Errors
/// As [`Judge::judge`]; if there is another number of them.
pub(super) fn verdicts_of(judge: &mut dyn Judge, answers: &[Answered]) -> Result<Vec<Verdict>> {
    let verdicts = judge.judge(answers)?;
    if verdicts.len() != answers.len() {
        let what = format!("verdicts of the judge {:?}", judge.name());
        return Err(Error::mismatch(what, answers.len(), verdicts.len()));
    }
    Ok(verdicts)
}

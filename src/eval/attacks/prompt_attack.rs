//! Attacks on a model as it is used.

use std::{ops::ControlFlow, time::Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Case, Error, Message, Result, SearchCost, Subject};

/// Tries to make a model do what one case asks for.
///
/// An attack tries, and judges decide: what it returns is a trajectory of attempts with the model's own answers. An error is a failure of this
/// case, told as such in the report; it ends nothing else.
pub trait PromptAttack {
    /// The attack in a report: unique among those of one evaluation.
    fn name(&self) -> String;

    /// Its settings: a record made with others is not gone on from.
    fn settings(&self) -> Value;

    /// What an attacker needs for it.
    fn access(&self) -> Access {
        Access::Text
    }

    /// Attacks one case. `watch` is told of each step, and says whether to go on; what was found until then is lost if it does not.
    ///
    /// # Errors
    /// Whatever the attack meets.
    fn attack(&mut self, subject: &Subject, case: &Case, watch: &mut Watch) -> Result<Outcome>;

    /// How many cases [`PromptAttack::attack_together`] gets at once; more than one only where it is implemented.
    fn at_once(&self, _subject: &Subject) -> usize {
        1
    }

    /// Attacks several cases, with an outcome for each, in order: by [`PromptAttack::attack`] one after another up to the
    /// first that is stopped, unless the attack has a faster way. An evaluation calls this one.
    ///
    /// # Errors
    /// Whatever the attack meets on one of them. An evaluation then tries their halves, all cases anew.
    fn attack_together(&mut self, subject: &Subject, cases: &[Case], watch: &mut Watch) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(cases.len());
        for case in cases {
            let stopped = outcomes.last() == Some(&Outcome::Stopped);
            outcomes.push(if stopped { Outcome::Stopped } else { self.attack(subject, case, watch)? });
        }
        Ok(outcomes)
    }
}

/// One case, by an attack that is written for several.
///
/// # Errors
/// Whatever the attack meets, or if it returns no outcome.
pub(super) fn attack_alone(
    attack: &mut impl PromptAttack,
    subject: &Subject,
    case: &Case,
    watch: &mut Watch,
) -> Result<Outcome> {
    let outcomes = attack.attack_together(subject, std::slice::from_ref(case), watch)?;
    outcomes.into_iter().next().ok_or_else(|| Error::mismatch("outcomes of an attack", 1, 0))
}

/// What an attacker must be able to touch. A report tells attacks by text apart from those that need more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// What a user writes.
    #[default]
    Text,
    /// The beginning of the answer.
    Answer,
    /// Embeddings, inside the ball of a threat set.
    Embeddings,
    /// Embeddings without bound: no threat but a check, which should break any model and counts in no summary.
    Unbounded,
    /// Nothing of this model: its answers, if they are its, were made elsewhere. Counts in no summary.
    Elsewhere,
}

/// Told of the steps done and the steps in all; says whether to go on.
pub type Watch<'a> = dyn FnMut(usize, usize) -> ControlFlow<()> + 'a;

/// How an attack on one case ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It ran to its end.
    Done(Trajectory),
    /// It was stopped: the case is to be attacked again from the start.
    Stopped,
}

/// What an attack on one case tried.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trajectory {
    /// In the order in which they were made.
    pub attempts: Vec<Attempt>,
    /// Which of them the attack offers in the end, having seen no verdict of the evaluation's judges.
    pub offered: usize,
    /// What the attack drove down, if it is one number: after each of its steps, or before and after all of them. Of the
    /// attacks here in nats per token of the target.
    pub losses: Vec<f64>,
    /// What it cost.
    pub cost: Cost,
}

/// One prompt and the answer to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attempt {
    /// Steps done before it.
    pub step: usize,
    /// Which of several drawn answers or parallel streams it is of, from 0.
    pub stream: usize,
    /// What the model was asked.
    pub messages: Vec<Message>,
    /// What the attack drives down, here; in the units of [`Trajectory::losses`].
    pub loss: Option<f64>,
    /// What the model said.
    pub answer: String,
}

/// What an attack cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Texts that the attacked model read for their loss or gradient.
    pub forward_passes: usize,
    /// Texts whose gradient was computed.
    pub backward_passes: usize,
    /// Tokens of those texts, what many of them begin with counted once where the model reads it once.
    pub tokens: usize,
    /// Texts that a cheaper model read in place of the attacked one.
    pub draft_passes: usize,
    /// Answers of the attacked model.
    pub answers: usize,
    /// Replies of helping models, and verdicts of the judge that PAIR's attacker is told.
    pub replies: usize,
    /// Wall-clock time; of cases attacked together an equal share.
    pub seconds: f64,
}

impl Trajectory {
    /// Says what a report cannot be made of, if it is that. JSON has no numbers that are not finite, and what they are of has
    /// overflowed.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let (attempts, offered) = (self.attempts.len(), self.offered);
        if attempts == 0 {
            return Err("the attack made no attempt; at least one is needed".into());
        }
        if offered >= attempts {
            return Err(format!("the attack offers attempt {offered}, of {attempts} from 0"));
        }
        let own = self.attempts.iter().filter_map(|attempt| attempt.loss);
        if !own.chain(self.losses.iter().copied()).all(f64::is_finite) {
            return Err("a loss is not a finite number".into());
        }
        Ok(())
    }

    /// What the attack offers in the end.
    pub fn offer(&self) -> Option<&Attempt> {
        self.attempts.get(self.offered)
    }
}

impl Cost {
    /// The passes of a search, and the time since it began.
    pub(super) fn of_search(search: &SearchCost, answers: usize, begin: Instant) -> Self {
        Self {
            forward_passes: search.forward_passes,
            backward_passes: search.backward_passes,
            tokens: search.tokens,
            draft_passes: 0,
            answers,
            replies: 0,
            seconds: begin.elapsed().as_secs_f64(),
        }
    }

    /// Adds what something else cost.
    pub fn add(&mut self, other: &Self) {
        self.forward_passes += other.forward_passes;
        self.backward_passes += other.backward_passes;
        self.tokens += other.tokens;
        self.draft_passes += other.draft_passes;
        self.answers += other.answers;
        self.replies += other.replies;
        self.seconds += other.seconds;
    }
}

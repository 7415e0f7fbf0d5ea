//! Accuracy on multiple choice, by the likelihood of the answers: the rules of EleutherAI's lm-evaluation-harness.

use serde::{Deserialize, Serialize};

use super::{answers::losses_of_rows, rate::Rate};
use crate::{
    Batch, CausalLm, ChatFormat, Continuation, ContinuationKind, Error, Example, Message, MultipleChoice, Result,
    TokenKind, Tokens,
};

/// How questions are put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuestionForm {
    /// ARC's: the question, then each answer in full.
    FullAnswers,
    /// MMLU's: the answers with letters, then each letter, behind solved questions on the same subject.
    Letters {
        /// The subject in words, `high school biology`.
        subject: String,
        /// The solved questions.
        examples: Vec<MultipleChoice>,
    },
}

/// How likely each answer to one question is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChoiceScores {
    /// The question's id.
    pub id: String,
    /// Which answer is right, from 0.
    pub answer: usize,
    /// The log-likelihood of each answer, nats.
    pub log_likelihoods: Vec<f64>,
    /// The length of each answer, in characters.
    pub lengths: Vec<usize>,
}

impl ChoiceScores {
    /// Whether the right answer is the likeliest (`acc`).
    pub fn is_right(&self) -> bool {
        likeliest(&self.log_likelihoods) == Some(self.answer)
    }

    /// Whether it is the likeliest per character (`acc_norm`).
    pub fn is_right_per_character(&self) -> bool {
        let per_character = self.log_likelihoods.iter().zip(&self.lengths).map(|(all, length)| all / *length as f64);
        likeliest(&per_character.collect::<Vec<_>>()) == Some(self.answer)
    }
}

/// The first of the largest, as numpy's argmax.
fn likeliest(numbers: &[f64]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (at, number) in numbers.iter().enumerate() {
        if best.is_none_or(|best| *number > numbers[best]) {
            best = Some(at);
        }
    }
    best
}

/// `acc` and `acc_norm`.
pub fn accuracy(scores: &[ChoiceScores]) -> (Rate, Rate) {
    let plain = Rate::of(scores.iter().map(ChoiceScores::is_right));
    (plain, Rate::of(scores.iter().map(ChoiceScores::is_right_per_character)))
}

/// The log-likelihood of every answer to a question. Inside the chat template the question is the user's message and the answers are
/// the model's; without, the text is given as it is, and no begin-of-sequence token is added.
///
/// # Errors
/// If the question cannot be rendered, or the model fails.
pub fn score_choices(
    model: &dyn CausalLm,
    format: &ChatFormat,
    item: &MultipleChoice,
    form: &QuestionForm,
    in_template: bool,
) -> Result<ChoiceScores> {
    let question = question(item, form);
    let answers: Vec<String> = match form {
        QuestionForm::FullAnswers => item.choices.clone(),
        QuestionForm::Letters { .. } => {
            LETTERS.iter().take(item.choices.len()).map(|letter| letter.to_string()).collect()
        }
    };
    let examples = answers.iter().map(|answer| {
        if in_template { in_chat(format, item, &question, answer) } else { as_text(format, item, &question, answer) }
    });
    let examples = examples.collect::<Result<Vec<_>>>()?;
    Ok(ChoiceScores {
        id: item.id.clone(),
        answer: item.answer,
        log_likelihoods: log_likelihoods(model, &examples)?,
        lengths: answers.iter().map(|answer| answer.chars().count()).collect(),
    })
}

const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

fn question(item: &MultipleChoice, form: &QuestionForm) -> String {
    let QuestionForm::Letters { subject, examples } = form else {
        return format!("Question: {}\nAnswer:", item.question);
    };
    let lettered = |item: &MultipleChoice| {
        let lines = LETTERS.iter().zip(&item.choices).map(|(letter, choice)| format!("{letter}. {choice}\n"));
        format!("{}\n{}Answer:", item.question.trim(), lines.collect::<String>())
    };
    let solved = examples.iter().map(|item| format!("{} {}\n\n", lettered(item), LETTERS[item.answer % LETTERS.len()]));
    let heading = format!("The following are multiple choice questions (with answers) about {subject}.\n\n");
    format!("{heading}{}{}", solved.collect::<String>(), lettered(item))
}

/// The question, a space, the answer: tokenised as one text and cut where the question alone ends.
fn as_text(format: &ChatFormat, item: &MultipleChoice, question: &str, answer: &str) -> Result<Example> {
    let tokenizer = format.tokenizer();
    let prompt = tokenizer.encode(question)?;
    let whole = tokenizer.encode(&format!("{question} {answer}"))?;
    let rest = whole.get(prompt.len()..).unwrap_or_default().to_vec();
    example(item, Tokens::of_kind(prompt, TokenKind::Template), Tokens::of_kind(rest, TokenKind::Target))
}

fn in_chat(format: &ChatFormat, item: &MultipleChoice, question: &str, answer: &str) -> Result<Example> {
    let opening = format.opening(&[Message::user(question)], answer)?;
    example(item, opening.prompt, opening.continuation)
}

fn example(item: &MultipleChoice, prompt: Tokens, tokens: Tokens) -> Result<Example> {
    if tokens.is_empty() {
        return Err(Error::example(&item.id, "an answer has no token of its own"));
    }
    Example::new(&item.id, prompt, vec![Continuation { kind: ContinuationKind::Utility, tokens }])
}

/// Of each example's continuation. What all prompts begin with is read once.
fn log_likelihoods(model: &dyn CausalLm, examples: &[Example]) -> Result<Vec<f64>> {
    let shared = shared_start(examples);
    let behind = model.behind(&shared)?;
    let cut = |example: &Example| {
        let prompt = example.prompt();
        let rest = Tokens::new(prompt.ids()[shared.len()..].to_vec(), prompt.kinds()[shared.len()..].to_vec())?;
        example.with_prompt(rest)
    };
    let examples = examples.iter().map(cut).collect::<Result<Vec<_>>>()?;
    let batch = Batch::new(examples, model.device())?;
    let losses = losses_of_rows(&*behind, &batch, ContinuationKind::Utility, None)?;
    Ok(losses.iter().map(|losses| -losses.sum()).collect())
}

/// The tokens that all prompts begin with, at least one less than the shortest has.
fn shared_start(examples: &[Example]) -> Vec<i64> {
    let Some(first) = examples.first() else { return Vec::new() };
    let same = |at: usize| examples.iter().all(|one| one.prompt().ids().get(at) == first.prompt().ids().get(at));
    let shortest = examples.iter().map(|one| one.prompt().len()).min().unwrap_or(0);
    let shared = (0..shortest.saturating_sub(1)).take_while(|at| same(*at)).count();
    first.prompt().ids()[..shared].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item() -> MultipleChoice {
        let choices = ["one", "two", "three", "four"].map(str::to_string).to_vec();
        MultipleChoice { id: "q".into(), question: " Which? ".into(), choices, answer: 2 }
    }

    #[test]
    fn questions_are_put_as_the_harness_puts_them() {
        assert_eq!(question(&item(), &QuestionForm::FullAnswers), "Question:  Which? \nAnswer:");
        let form = QuestionForm::Letters { subject: "tests".into(), examples: vec![item()] };
        let lettered = "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:";
        let heading = "The following are multiple choice questions (with answers) about tests.";
        assert_eq!(question(&item(), &form), format!("{heading}\n\n{lettered} C\n\n{lettered}"));
    }

    #[test]
    fn a_tie_goes_to_the_first() {
        assert_eq!(likeliest(&[-2.0, -1.0, -1.0]), Some(1));
    }

    #[test]
    fn length_counts_in_characters() {
        let scores =
            ChoiceScores { id: "q".into(), answer: 1, log_likelihoods: vec![-2.0, -3.0], lengths: vec![2, 10] };
        assert!(!scores.is_right() && scores.is_right_per_character());
    }
}

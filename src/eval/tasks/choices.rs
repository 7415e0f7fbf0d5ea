//! Accuracy on multiple choice, by the likelihood of the answers: the rules of EleutherAI's lm-evaluation-harness.

use serde::{Deserialize, Serialize};

use super::framing::Framing;
use crate::{
    Batch, CausalLm, ChatFormat, Continuation, ContinuationKind, Error, Example, Message, MultipleChoice, Rate, Result,
    TokenKind, Tokens, eval::measuring::answers::losses_of_rows,
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

/// The log-likelihood of every answer to a question. Inside the chat template the question is the user's message and
/// the answers are the model's; as text, both are read as one.
///
/// # Errors
/// If the question has no right answer or more answers than letters, cannot be rendered, or the model fails or finds no
/// number.
pub fn score_choices(
    model: &dyn CausalLm,
    format: &ChatFormat,
    item: &MultipleChoice,
    form: &QuestionForm,
    framing: Framing,
) -> Result<ChoiceScores> {
    score_examples(model, item, form, &choice_examples(format, item, form, framing)?)
}

/// The question with each answer to it.
pub(super) fn choice_examples(
    format: &ChatFormat,
    item: &MultipleChoice,
    form: &QuestionForm,
    framing: Framing,
) -> Result<Vec<Example>> {
    check_question(&item.id, item, form)?;
    let question = question(item, form)?;
    let example = |answer: &String| match framing {
        Framing::Template => in_chat(format, item, &question, answer),
        Framing::Text { bos } => as_text(format, item, &question, answer, bos),
    };
    answers_of(item, form).iter().map(example).collect()
}

/// The scores of what [`choice_examples`] gave.
pub(super) fn score_examples(
    model: &dyn CausalLm,
    item: &MultipleChoice,
    form: &QuestionForm,
    examples: &[Example],
) -> Result<ChoiceScores> {
    let log_likelihoods = log_likelihoods(model, examples)?;
    if let Some((at, value)) = log_likelihoods.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        let message = format!("the log-likelihood of answer {at} is {value}, not a finite number");
        return Err(Error::example(&item.id, message));
    }
    let lengths = answers_of(item, form).iter().map(|answer| answer.chars().count()).collect();
    Ok(ChoiceScores { id: item.id.clone(), answer: item.answer, log_likelihoods, lengths })
}

const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// What the model may say.
fn answers_of(item: &MultipleChoice, form: &QuestionForm) -> Vec<String> {
    match form {
        QuestionForm::FullAnswers => item.choices.clone(),
        QuestionForm::Letters { .. } => LETTERS.chars().take(item.choices.len()).map(String::from).collect(),
    }
}

/// `of` is the question that is put, with this one or behind this one.
fn check_question(of: &str, item: &MultipleChoice, form: &QuestionForm) -> Result<()> {
    let (choices, letters) = (item.choices.len(), LETTERS.len());
    let lettered = matches!(form, QuestionForm::Letters { .. });
    if item.answer >= choices {
        let message = format!("the right answer of {} is number {}, of {choices} from 0", item.id, item.answer);
        return Err(Error::example(of, message));
    }
    if lettered && choices > letters {
        let message = format!("{} has {choices} answers; there are letters for at most {letters}", item.id);
        return Err(Error::example(of, message));
    }
    Ok(())
}

fn question(item: &MultipleChoice, form: &QuestionForm) -> Result<String> {
    let QuestionForm::Letters { subject, examples } = form else {
        return Ok(format!("Question: {}\nAnswer:", item.question));
    };
    let mut text = format!("The following are multiple choice questions (with answers) about {subject}.\n\n");
    for example in examples {
        check_question(&item.id, example, form)?;
        let letter = &LETTERS[example.answer..=example.answer];
        text.push_str(&format!("{} {letter}\n\n", lettered(example)));
    }
    Ok(text + &lettered(item))
}

fn lettered(item: &MultipleChoice) -> String {
    let lines = LETTERS.chars().zip(&item.choices).map(|(letter, choice)| format!("{letter}. {choice}\n"));
    format!("{}\n{}Answer:", item.question.trim(), lines.collect::<String>())
}

/// The question, a space, the answer: tokenised as one text and cut where the question alone ends.
fn as_text(format: &ChatFormat, item: &MultipleChoice, question: &str, answer: &str, bos: bool) -> Result<Example> {
    let prompt = Framing::plain(format, question, bos)?;
    let whole = Framing::plain(format, &format!("{question} {answer}"), bos)?;
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
        assert_eq!(question(&item(), &QuestionForm::FullAnswers).unwrap(), "Question:  Which? \nAnswer:");
        let form = QuestionForm::Letters { subject: "tests".into(), examples: vec![item()] };
        let lettered = "Which?\nA. one\nB. two\nC. three\nD. four\nAnswer:";
        let heading = "The following are multiple choice questions (with answers) about tests.";
        assert_eq!(question(&item(), &form).unwrap(), format!("{heading}\n\n{lettered} C\n\n{lettered}"));
    }

    #[test]
    fn a_right_answer_that_is_not_there_and_answers_without_letters_are_errors() {
        let wrong = MultipleChoice { id: "w".into(), answer: 4, ..item() };
        let form = QuestionForm::Letters { subject: "tests".into(), examples: vec![wrong.clone()] };
        let message = question(&item(), &form).unwrap_err().to_string();
        assert_eq!(message, "example q: the right answer of w is number 4, of 4 from 0");
        assert!(check_question("w", &wrong, &QuestionForm::FullAnswers).is_err());
        let many = MultipleChoice { choices: vec!["one".into(); 27], ..item() };
        let message = check_question("q", &many, &form).unwrap_err().to_string();
        assert_eq!(message, "example q: q has 27 answers; there are letters for at most 26");
        assert!(check_question("q", &many, &QuestionForm::FullAnswers).is_ok());
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

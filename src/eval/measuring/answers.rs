//! What a model says to plain requests, and how likely it holds given answers.

use ndarray::Array1;

use crate::{
    Batch, CausalLm, ChatFormat, ContinuationKind, Error, Example, Generation, Input, Last, Message, Pass,
    Perturbation, Result, loss::target_log_probs, tensor,
};

/// The answer to each conversation, without special tokens; `rows` conversations are answered together.
///
/// # Errors
/// If a conversation cannot be rendered, `rows` is 0, or the model fails.
pub fn answers(
    model: &dyn CausalLm,
    format: &ChatFormat,
    conversations: &[Vec<Message>],
    settings: &Generation,
    rows: usize,
) -> Result<Vec<String>> {
    Error::check_count("rows", rows)?;
    let mut texts = Vec::with_capacity(conversations.len());
    for (chunk, conversations) in conversations.chunks(rows).enumerate() {
        let prompts = conversations.iter().enumerate().map(|(index, messages)| {
            Example::new(format!("prompt/{}", chunk * rows + index), format.prompt(messages)?, Vec::new())
        });
        texts.extend(answers_to(model, format, prompts.collect::<Result<_>>()?, settings)?);
    }
    Ok(texts)
}

/// The answers to prompts that are tokens already, together, without special tokens.
pub(crate) fn answers_to(
    model: &dyn CausalLm,
    format: &ChatFormat,
    prompts: Vec<Example>,
    settings: &Generation,
) -> Result<Vec<String>> {
    let answers = model.generate(&Batch::new(prompts, model.device())?, None, settings)?;
    answers.iter().map(|ids| format.tokenizer().decode(ids, true)).collect()
}

/// Cross-entropy in nats of each target token of each example's continuation of a kind, without perturbation: one array
/// `[targets]` per example. `rows` examples are computed together.
///
/// # Errors
/// If an example has no such continuation, `rows` is 0, or the model fails.
pub fn target_losses(
    model: &dyn CausalLm,
    examples: &[Example],
    kind: ContinuationKind,
    rows: usize,
) -> Result<Vec<Array1<f64>>> {
    Error::check_count("rows", rows)?;
    let mut losses = Vec::with_capacity(examples.len());
    for examples in examples.chunks(rows) {
        let batch = Batch::of_kind(examples, kind, model.device())?;
        losses.extend(losses_of_rows(model, &batch, kind, None)?);
    }
    Ok(losses)
}

/// Cross-entropy in nats of the target tokens of each row's continuation of a kind.
pub(crate) fn losses_of_rows(
    model: &dyn CausalLm,
    batch: &Batch,
    kind: ContinuationKind,
    perturbation: Option<&Perturbation>,
) -> Result<Vec<Array1<f64>>> {
    let _guard = tch::no_grad_guard();
    let pass = Pass { last: Last::Predictors, ..Pass::default() };
    let hidden = model.hidden(&Input::of_batch(model, batch, perturbation, pass)?)?;
    let (log_probs, targets) = target_log_probs(model, batch, &hidden, kind)?;
    let mut rows = vec![Vec::new(); batch.rows()];
    for (target, log_prob) in targets.list.iter().zip(tensor::numbers(&log_probs)?) {
        rows[target.row].push(-log_prob);
    }
    Ok(rows.into_iter().map(Array1::from).collect())
}

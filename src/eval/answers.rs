//! What a model says to plain requests, and how likely it holds given answers.

use crate::{
    Batch, CausalLm, ChatFormat, ContinuationKind, Example, Generation, Input, Message, Pass, Result,
    loss::target_log_probs, tensor,
};

/// The answer to each conversation, without special tokens; `rows` conversations are answered together.
///
/// # Errors
/// If a conversation cannot be rendered, or the model fails.
pub fn answers(
    model: &dyn CausalLm,
    format: &ChatFormat,
    conversations: &[Vec<Message>],
    settings: &Generation,
    rows: usize,
) -> Result<Vec<String>> {
    let mut texts = Vec::with_capacity(conversations.len());
    for (chunk, conversations) in conversations.chunks(rows.max(1)).enumerate() {
        let prompts = conversations.iter().enumerate().map(|(index, messages)| {
            Example::new(format!("prompt/{}", chunk * rows.max(1) + index), format.prompt(messages)?, Vec::new())
        });
        let batch = Batch::new(prompts.collect::<Result<_>>()?, model.device())?;
        for ids in model.generate(&batch, None, settings)? {
            texts.push(format.tokenizer().decode(&ids, true)?);
        }
    }
    Ok(texts)
}

/// Mean cross-entropy in nats of each example's continuation of a kind, over its target tokens, without perturbation.
///
/// # Errors
/// If an example has no such continuation, or the model fails.
pub fn mean_target_loss(
    model: &dyn CausalLm,
    examples: &[Example],
    kind: ContinuationKind,
    rows: usize,
) -> Result<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let mut losses = Vec::with_capacity(examples.len());
    for examples in examples.chunks(rows.max(1)) {
        let batch = Batch::new(examples.iter().map(|example| example.keep(&[kind])).collect(), model.device())?;
        let hidden = model.hidden(&Input::of_batch(model, &batch, None, Pass::default())?)?;
        let (log_probs, targets) = target_log_probs(model, &batch, &hidden, kind)?;
        losses.extend(tensor::numbers(&targets.mean_per_row(&log_probs.f_neg()?)?)?);
    }
    Ok(losses)
}

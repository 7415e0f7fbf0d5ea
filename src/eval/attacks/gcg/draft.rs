//! A cheaper model that chooses candidates.

use std::cell::Cell;

use super::places::Places;
use crate::{
    Case, CausalLm, ChatFormat, Continuation, ContinuationKind, Draft, EncodedChat, Example, Message, ProbeSampling,
    Result, TokenKind, TokenSearchSettings, Tokens, target_losses,
};

/// A cheaper model, with a tokenizer and template of its own.
pub(super) struct DraftModel<'a> {
    pub(super) name: String,
    pub(super) model: &'a dyn CausalLm,
    pub(super) format: &'a ChatFormat,
    pub(super) probe: ProbeSampling,
}

/// The draft model's losses of the attacked model's candidates.
pub(super) struct DraftJudge<'s, 'a> {
    pub(super) draft: &'s DraftModel<'a>,
    pub(super) cases: &'s [Case],
    pub(super) places: &'s Places<'s>,
    pub(super) settings: &'s TokenSearchSettings,
    /// Texts that were read so far.
    pub(super) passes: &'s Cell<usize>,
}

impl DraftJudge<'_, '_> {
    /// The losses of one case's candidates: infinite where the draft model's template does not take the conversation.
    fn losses_of(&self, conversations: &[Vec<Message>], target: &str) -> Result<Vec<f64>> {
        let opening = |messages: &Vec<Message>| match self.draft.format.opening(messages, target) {
            Err(error) if error.is_of_conversation() => Ok(None),
            opening => opening.map(Some),
        };
        let openings = conversations.iter().map(opening).collect::<Result<Vec<_>>>()?;
        let taken: Vec<bool> = openings.iter().map(Option::is_some).collect();
        let mut losses = self.losses_of_openings(openings.into_iter().flatten().collect())?.into_iter();
        let mut loss = |taken: bool| if taken { losses.next() } else { None };
        Ok(taken.into_iter().map(|taken| loss(taken).unwrap_or(f64::INFINITY)).collect())
    }

    /// What all of the conversations begin with is read once.
    fn losses_of_openings(&self, openings: Vec<EncodedChat>) -> Result<Vec<f64>> {
        let model = self.draft.model;
        let prompts: Vec<&[i64]> = openings.iter().map(|opening| opening.prompt.ids()).collect();
        let common = common(&prompts);
        let model = model.behind(prompts.first().map_or(&[][..], |first| &first[..common]))?;
        let rest = |opening: EncodedChat| {
            let prompt = Tokens::of_kind(opening.prompt.ids()[common..].to_vec(), TokenKind::User);
            let target = Continuation { kind: ContinuationKind::Harmful, tokens: opening.continuation };
            Example::new("candidate", prompt, vec![target])
        };
        let examples = openings.into_iter().map(rest).collect::<Result<Vec<_>>>()?;
        self.passes.set(self.passes.get() + examples.len());
        let losses = target_losses(&*model, &examples, ContinuationKind::Harmful, self.settings.rows)?;
        Ok(losses.into_iter().map(|losses| self.settings.loss.of(&losses.to_vec())).collect())
    }
}

/// How many tokens all prompts begin with in common; each keeps one of its own.
fn common(prompts: &[&[i64]]) -> usize {
    let Some((first, others)) = prompts.split_first() else { return 0 };
    let same = |other: &&[i64]| first.iter().zip(*other).take_while(|(a, b)| a == b).count().min(other.len() - 1);
    others.iter().map(same).min().unwrap_or(first.len() - 1).min(first.len() - 1)
}

impl Draft for DraftJudge<'_, '_> {
    fn losses(&mut self, candidates: &[Vec<i64>]) -> Result<Vec<f64>> {
        // Candidates come as tokens of the attacked model, and have been read back.
        let strings = candidates.iter().map(|ids| Ok(self.places.string_of(ids)?.unwrap_or_default()));
        let strings = strings.collect::<Result<Vec<String>>>()?;
        let mut sums = vec![0.0; candidates.len()];
        for (at, case) in self.cases.iter().enumerate() {
            let conversations: Vec<Vec<Message>> =
                strings.iter().map(|string| self.places.messages_of(at, string)).collect();
            let losses = self.losses_of(&conversations, &case.target)?;
            sums.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
        }
        Ok(sums)
    }
}

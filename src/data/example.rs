//! One training or evaluation row as token ids, before it becomes a tensor.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Result, digest::hex};

/// What a token is. Decided where the text is rendered, never from the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenKind {
    /// Begin-of-sequence, role tags, system prompt, earlier answers, the header of the answer: all that is read and is
    /// neither the user's own text nor predicted.
    Template,
    /// The user's own text.
    User,
    /// A token whose probability the losses look at.
    Target,
}

/// What a continuation is, for the losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContinuationKind {
    /// The harmful answer that the attack makes likelier and training drives away from.
    Harmful,
    /// The safe answer that training drives toward.
    Safe,
    /// A useful answer to a harmless prompt.
    Utility,
}

/// Token ids, each with its kind; the two lists have the same length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    ids: Vec<i64>,
    kinds: Vec<TokenKind>,
}

impl Tokens {
    /// Pairs ids with their kinds.
    ///
    /// # Errors
    /// If the lists differ in length.
    pub fn new(ids: Vec<i64>, kinds: Vec<TokenKind>) -> Result<Self> {
        if ids.len() != kinds.len() {
            return Err(Error::mismatch("kinds of tokens", format!("{} kinds, one per id", ids.len()), kinds.len()));
        }
        Ok(Self { ids, kinds })
    }

    /// All ids with the same kind.
    pub fn of_kind(ids: Vec<i64>, kind: TokenKind) -> Self {
        let kinds = vec![kind; ids.len()];
        Self { ids, kinds }
    }

    /// The token ids.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// The kind of each token.
    pub fn kinds(&self) -> &[TokenKind] {
        &self.kinds
    }

    /// How many tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// How many tokens are targets.
    pub fn targets(&self) -> usize {
        self.kinds.iter().filter(|kind| **kind == TokenKind::Target).count()
    }

    /// Drops all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.kinds.truncate(len);
    }

    /// Drops all tokens behind the first `most` targets.
    fn truncate_targets(&mut self, most: usize) {
        let targets = self.kinds.iter().enumerate().filter(|(_, kind)| **kind == TokenKind::Target);
        let beyond = targets.map(|(at, _)| at).nth(most);
        self.truncate(beyond.unwrap_or(self.len()));
    }

    /// Adds the ids of tokens behind these, as [`TokenKind::Template`]: read, not predicted.
    pub(crate) fn extend_as_template(&mut self, other: &Tokens) {
        self.extend(&Self::of_kind(other.ids.clone(), TokenKind::Template));
    }

    /// Adds tokens behind these.
    pub fn extend(&mut self, other: &Tokens) {
        self.ids.extend_from_slice(&other.ids);
        self.kinds.extend_from_slice(&other.kinds);
    }
}

/// One answer to a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// What it is to the losses.
    pub kind: ContinuationKind,
    /// Its tokens. At least one is a [`TokenKind::Target`]; in a chat of several turns the user's later turns are in here
    /// too, as tokens that are read and not predicted.
    pub tokens: Tokens,
}

/// A prompt and its continuations: one row of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    id: String,
    prompt: Tokens,
    continuations: Vec<Continuation>,
}

impl Example {
    /// A row, checked.
    ///
    /// # Errors
    /// If the prompt is empty or holds a target, if there are two continuations of one kind, or if a continuation has no
    /// target.
    pub fn new(id: impl Into<String>, prompt: Tokens, continuations: Vec<Continuation>) -> Result<Self> {
        let id = id.into();
        if prompt.is_empty() {
            return Err(Error::example(
                id,
                "the prompt has no token; the first token of an answer needs one before it",
            ));
        }
        if prompt.targets() > 0 {
            return Err(Error::example(id, "the prompt holds a target token; targets belong to continuations"));
        }
        for (index, continuation) in continuations.iter().enumerate() {
            let kind = continuation.kind;
            if continuation.tokens.targets() == 0 {
                return Err(Error::example(id, format!("the {kind:?} continuation has no target token")));
            }
            if continuations[..index].iter().any(|other| other.kind == kind) {
                return Err(Error::example(id, format!("has two {kind:?} continuations; one of each kind is allowed")));
            }
        }
        Ok(Self { id, prompt, continuations })
    }

    /// The stable id: the same for the same row of the same file in every run.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The prompt, shared by all continuations.
    pub fn prompt(&self) -> &Tokens {
        &self.prompt
    }

    /// The continuations; each sees the prompt and itself alone.
    pub fn continuations(&self) -> &[Continuation] {
        &self.continuations
    }

    /// The continuation of a kind, if there is one.
    pub fn continuation(&self, kind: ContinuationKind) -> Option<&Continuation> {
        self.continuations.iter().find(|continuation| continuation.kind == kind)
    }

    /// Prompt and continuations together.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.continuations.iter().map(|continuation| continuation.tokens.len()).sum::<usize>()
    }

    /// Never: a prompt has at least one token.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The same row with only the continuations of these kinds.
    #[must_use]
    pub fn keep(&self, kinds: &[ContinuationKind]) -> Self {
        let continuations = self.continuations.iter().filter(|one| kinds.contains(&one.kind)).cloned().collect();
        Self { id: self.id.clone(), prompt: self.prompt.clone(), continuations }
    }

    /// The same row with continuations cut before their target number `most + 1`, counted from 1: how an answer begins decides
    /// whether it is a refusal.
    ///
    /// # Errors
    /// If `most` is 0.
    pub fn first_targets(mut self, most: usize) -> Result<Self> {
        self.continuations.iter_mut().for_each(|continuation| continuation.tokens.truncate_targets(most));
        Self::new(self.id, self.prompt, self.continuations)
    }

    /// Joins two rows that answer the same prompt: this one's continuations, then the other's.
    ///
    /// # Errors
    /// If the prompts differ (a perturbation found on one could not be put on the other), with both lengths in the message;
    /// or as [`Example::new`].
    pub fn join(self, other: Self) -> Result<Self> {
        if self.prompt != other.prompt {
            return Err(Error::example(
                &self.id,
                format!(
                    "the prompts of its continuations differ ({} tokens and {} tokens); they must be the same",
                    self.prompt.len(),
                    other.prompt.len()
                ),
            ));
        }
        Self::new(self.id, self.prompt, [self.continuations, other.continuations].concat())
    }

    /// The same row with another prompt, for attacks that change tokens.
    ///
    /// # Errors
    /// As [`Example::new`].
    pub fn with_prompt(&self, prompt: Tokens) -> Result<Self> {
        Self::new(self.id.clone(), prompt, self.continuations.clone())
    }

    /// A text that differs between lists of rows that differ in an id, a token, or what a token is: for cache keys, and to
    /// tell whether two runs had the same rows.
    pub fn digest(rows: &[Self]) -> String {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            // Its length keeps each piece apart from what follows.
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for example in rows {
            add(example.id.as_bytes());
            let continuations = example.continuations.iter().map(|one| (format!("{:?}", one.kind), &one.tokens));
            for (kind, tokens) in std::iter::once(("prompt".to_string(), &example.prompt)).chain(continuations) {
                add(kind.as_bytes());
                add(&tokens.ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>());
                add(&tokens.kinds.iter().map(|kind| *kind as u8).collect::<Vec<_>>());
            }
        }
        format!("{} rows, {}", rows.len(), &hex(&hash.finalize())[..16])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &[i64], kind: ContinuationKind, answer: &[i64]) -> Example {
        let tokens = Tokens::of_kind(answer.to_vec(), TokenKind::Target);
        let prompt = Tokens::of_kind(prompt.to_vec(), TokenKind::User);
        Example::new("e", prompt, vec![Continuation { kind, tokens }]).unwrap()
    }

    #[test]
    fn an_answer_is_cut_behind_its_first_targets() {
        use TokenKind::{Target, Template};
        let kinds = vec![Target, Target, Template, Target, Target];
        let tokens = Tokens::new(vec![3, 4, 5, 6, 7], kinds).unwrap();
        let continuation = Continuation { kind: ContinuationKind::Utility, tokens };
        let row = Example::new("e", Tokens::of_kind(vec![1], TokenKind::User), vec![continuation]).unwrap();
        let cut = |most| row.clone().first_targets(most).map(|row| row.continuations[0].tokens.ids().to_vec());
        assert_eq!(cut(1).unwrap(), [3]);
        assert_eq!(cut(3).unwrap(), [3, 4, 5, 6]);
        assert_eq!(cut(4).unwrap(), [3, 4, 5, 6, 7]);
        assert_eq!(cut(9).unwrap(), [3, 4, 5, 6, 7]);
        assert!(cut(0).is_err());
    }

    #[test]
    fn rows_differ_by_tokens_kinds_and_where_the_prompt_ends() {
        let base = row(&[1, 2], ContinuationKind::Harmful, &[3, 4]);
        let others = [
            row(&[1, 2], ContinuationKind::Harmful, &[3, 5]),
            row(&[1, 2], ContinuationKind::Safe, &[3, 4]),
            row(&[1, 2, 3], ContinuationKind::Harmful, &[4]),
        ];
        let of_one = |row: &Example| Example::digest(std::slice::from_ref(row));
        assert_eq!(of_one(&base), of_one(&base.clone()));
        assert!(others.iter().all(|other| of_one(other) != of_one(&base)));
        assert_ne!(Example::digest(&[base.clone(), base.clone()]), of_one(&base));
    }
}

//! Where each token of a batch stands, and what it may see.

use std::{collections::BTreeSet, ops::Range};

use tch::{Device, Kind, Tensor};

use super::{ContinuationKind, Example, TokenKind};
use crate::{Error, Result, tensor};

/// Rows of tokens behind each other without padding.
///
/// A row is a prompt and any number of continuations. Every per-token tensor of a batch is `[tokens, …]` in this order:
/// prompt of row 0, its continuations one after the other, prompt of row 1, and so on. A continuation sees the prompt of
/// its row and itself, not the other continuations, and its positions go on behind the prompt (a tree of depth one). There
/// is no padding and so no padding mask; [`Layout::from_padded`] and [`Layout::to_padded`] translate for those who have one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    rows: Vec<RowLayout>,
    kinds: Vec<TokenKind>,
}

/// The spans of one row, as ranges of packed token indices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowLayout {
    prompt: Range<usize>,
    continuations: Vec<(ContinuationKind, Range<usize>)>,
}

/// A token that is predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The row.
    pub row: usize,
    /// Packed index of the token.
    pub token: usize,
    /// Packed index of the token before it, whose hidden state predicts it.
    pub predictor: usize,
}

/// The side on which shorter rows are filled up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Padding comes first.
    Left,
    /// Padding comes last.
    Right,
}

impl RowLayout {
    /// The prompt's tokens.
    pub fn prompt(&self) -> Range<usize> {
        self.prompt.clone()
    }

    /// Each continuation's kind and tokens.
    pub fn continuations(&self) -> &[(ContinuationKind, Range<usize>)] {
        &self.continuations
    }

    /// The tokens of the continuation of a kind, if the row has one.
    pub fn continuation(&self, kind: ContinuationKind) -> Option<Range<usize>> {
        self.continuations.iter().find(|(other, _)| *other == kind).map(|(_, range)| range.clone())
    }

    /// All tokens of the row.
    pub fn tokens(&self) -> Range<usize> {
        self.prompt.start..self.continuations.last().map_or(self.prompt.end, |(_, range)| range.end)
    }

    /// Tokens from the start of the prompt to the end of the longest continuation: the row's length as a text.
    pub fn path_len(&self) -> usize {
        self.prompt.len() + self.continuations.iter().map(|(_, range)| range.len()).max().unwrap_or(0)
    }

    /// The position in the text of a token of this row, by its packed index.
    fn position(&self, token: usize) -> usize {
        match self.continuations.iter().find(|(_, range)| range.contains(&token)) {
            Some((_, range)) => self.prompt.len() + token - range.start,
            None => token - self.prompt.start,
        }
    }

    /// Whether `key` comes before or at `query` on the same path. Both are packed indices of this row.
    fn precedes(&self, key: usize, query: usize) -> bool {
        if key > query {
            return false;
        }
        self.prompt.contains(&key)
            || self.continuations.iter().any(|(_, range)| range.contains(&key) && range.contains(&query))
    }
}

impl Layout {
    /// The layout of these examples, in order.
    pub fn of_examples<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut layout = Self { rows: Vec::new(), kinds: Vec::new() };
        for example in examples {
            let prompt = layout.append(example.prompt().kinds());
            let continuations = example
                .continuations()
                .iter()
                .map(|continuation| (continuation.kind, layout.append(continuation.tokens.kinds())))
                .collect();
            layout.rows.push(RowLayout { prompt, continuations });
        }
        layout
    }

    /// Rows that are prompts alone, of these lengths, every token of kind [`TokenKind::Template`].
    pub fn of_lengths(lengths: &[usize]) -> Self {
        let mut layout = Self { rows: Vec::new(), kinds: Vec::new() };
        for len in lengths {
            let prompt = layout.append(&vec![TokenKind::Template; *len]);
            layout.rows.push(RowLayout { prompt, continuations: Vec::new() });
        }
        layout
    }

    /// The same rows, each behind so many more tokens of its prompt, of kind [`TokenKind::Template`].
    pub(crate) fn behind(&self, tokens: &[usize]) -> Self {
        let mut kinds = Vec::with_capacity(self.kinds.len() + tokens.iter().sum::<usize>());
        let mut moved = 0;
        let rows = self.rows.iter().zip(tokens).map(|(row, tokens)| {
            kinds.extend(std::iter::repeat_n(TokenKind::Template, *tokens));
            kinds.extend_from_slice(&self.kinds[row.tokens()]);
            let first = row.prompt.start + moved;
            moved += tokens;
            let place = |range: &Range<usize>| range.start + moved..range.end + moved;
            let continuations = row.continuations.iter().map(|(kind, range)| (*kind, place(range))).collect();
            RowLayout { prompt: first..place(&row.prompt).end, continuations }
        });
        let rows = rows.collect();
        Self { rows, kinds }
    }

    /// The first tokens of row 0's prompt as a row of their own, then every row without so many. Each prompt has more.
    pub(crate) fn sharing(&self, tokens: usize) -> Self {
        let mut layout = Self::of_lengths(&[]);
        let prompt = layout.append(&self.kinds[..tokens]);
        layout.rows.push(RowLayout { prompt, continuations: Vec::new() });
        for row in &self.rows {
            let prompt = layout.append(&self.kinds[row.prompt.start + tokens..row.prompt.end]);
            let place =
                |(kind, range): &(ContinuationKind, Range<usize>)| (*kind, layout.append(&self.kinds[range.clone()]));
            let continuations = row.continuations.iter().map(place).collect();
            layout.rows.push(RowLayout { prompt, continuations });
        }
        layout
    }

    fn append(&mut self, kinds: &[TokenKind]) -> Range<usize> {
        let start = self.kinds.len();
        self.kinds.extend_from_slice(kinds);
        start..self.kinds.len()
    }

    /// The layout of a padded batch, from its attention mask `[rows, length]` of 0 and 1, padded on either side; and the
    /// indices, into the flattened `[rows * length]`, of the tokens that are really there, in packed order.
    ///
    /// # Errors
    /// If a row has a gap (padding between tokens) or no token.
    pub fn from_padded(mask: &Tensor) -> Result<(Self, Vec<i64>)> {
        let (rows, length) = mask.size2()?;
        let mask = Vec::<i64>::try_from(mask.f_to_kind(Kind::Int64)?.f_reshape([-1])?)?;
        let mut index = Vec::new();
        let mut lengths = Vec::new();
        for row in 0..rows as usize {
            let start = row * length as usize;
            let present: Vec<usize> = (start..start + length as usize).filter(|at| mask[*at] != 0).collect();
            let (Some(first), Some(last)) = (present.first(), present.last()) else {
                return Err(Error::mismatch(format!("attention mask, row {row}"), "at least one token", "none"));
            };
            if last - first + 1 != present.len() {
                return Err(Error::mismatch(
                    format!("attention mask, row {row}"),
                    "padding at one end or both",
                    "a gap between tokens",
                ));
            }
            lengths.push(present.len());
            index.extend(present.iter().map(|at| *at as i64));
        }
        Ok((Self::of_lengths(&lengths), index))
    }

    /// A packed tensor `[tokens, …]` as `[rows, longest, …]`, filled up with zeros on one side.
    ///
    /// A continuation of a tree stands behind the one before it.
    ///
    /// # Errors
    /// If the tensor's first dimension is not [`Layout::tokens`].
    pub fn to_padded(&self, packed: &Tensor, side: Side) -> Result<Tensor> {
        self.check_tokens("packed tensor", packed)?;
        let longest = self.longest_row();
        let mut size = packed.size();
        size.splice(0..1, [self.rows.len() as i64 * longest as i64]);
        let index: Vec<i64> = (self.rows.iter().enumerate())
            .flat_map(|(row, spans)| {
                let tokens = spans.tokens();
                let skip = if side == Side::Left { longest - tokens.len() } else { 0 };
                (0..tokens.len()).map(move |at| (row * longest + skip + at) as i64)
            })
            .collect();
        let index = tensor::index(&index, packed.device())?;
        let flat =
            Tensor::f_zeros(size.as_slice(), (packed.kind(), packed.device()))?.f_index_add(0, &index, packed)?;
        size.splice(0..1, [self.rows.len() as i64, longest as i64]);
        Ok(flat.f_view(size.as_slice())?)
    }

    /// An error unless the first dimension of `tensor` is the number of tokens.
    pub(crate) fn check_tokens(&self, what: &str, tensor: &Tensor) -> Result<()> {
        let found = tensor.size().first().copied().unwrap_or(0);
        if found != self.tokens() as i64 {
            return Err(Error::mismatch(
                what,
                format!("[{} tokens, …]", self.tokens()),
                format!("{:?}", tensor.size()),
            ));
        }
        Ok(())
    }

    /// How many tokens all rows have together.
    pub fn tokens(&self) -> usize {
        self.kinds.len()
    }

    /// The rows.
    pub fn rows(&self) -> &[RowLayout] {
        &self.rows
    }

    /// The kind of each token, in packed order.
    pub fn kinds(&self) -> &[TokenKind] {
        &self.kinds
    }

    /// Tokens of each row, prompt and all continuations together.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.tokens().len()).collect()
    }

    /// Tokens of the row that has most, prompt and all continuations together.
    pub fn longest_row(&self) -> usize {
        self.rows.iter().map(|row| row.tokens().len()).max().unwrap_or(0)
    }

    /// The position of each token in its text, from 0, in packed order. Continuations go on where the prompt ends.
    pub fn positions(&self) -> Vec<i64> {
        self.rows.iter().flat_map(|row| row.tokens().map(|token| row.position(token) as i64)).collect()
    }

    /// The tokens that are predicted, of the continuations of the given kind, in packed order.
    pub fn targets(&self, kind: ContinuationKind) -> Vec<Target> {
        let mut targets = Vec::new();
        for (row, spans) in self.rows.iter().enumerate() {
            let Some(range) = spans.continuation(kind) else { continue };
            for token in range.clone().filter(|token| self.kinds[*token] == TokenKind::Target) {
                let predictor = if token == range.start { spans.prompt.end - 1 } else { token - 1 };
                targets.push(Target { row, token, predictor });
            }
        }
        targets
    }

    /// The tokens that predict a target of any continuation, packed indices, ascending.
    pub fn predictors(&self) -> Vec<usize> {
        let kinds = self.rows.iter().flat_map(|row| row.continuations.iter().map(|(kind, _)| *kind));
        let kinds: BTreeSet<_> = kinds.collect();
        let predictors = kinds.into_iter().flat_map(|kind| self.targets(kind)).map(|target| target.predictor);
        predictors.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Rows that have a continuation of the given kind.
    pub fn rows_with(&self, kind: ContinuationKind) -> Vec<usize> {
        (0..self.rows.len()).filter(|row| self.rows[*row].continuation(kind).is_some()).collect()
    }

    /// Whether no row has more than one continuation: then every row is one text.
    pub fn is_linear(&self) -> bool {
        self.rows.iter().all(|row| row.continuations.len() <= 1)
    }

    /// Whether the token `query` may attend to the token `key` (packed indices): same row, same path, not later, and, with
    /// a sliding window of w, fewer than w positions back (the edge of transformers' `masking_utils`).
    pub fn sees(&self, query: usize, key: usize, window: Option<usize>) -> bool {
        let Some(row) = self.rows.iter().find(|row| row.tokens().contains(&query)) else { return false };
        row.tokens().contains(&key) && self.row_sees(row, query, key, window)
    }

    fn row_sees(&self, row: &RowLayout, query: usize, key: usize, window: Option<usize>) -> bool {
        row.precedes(key, query) && window.is_none_or(|window| row.position(query) < row.position(key) + window)
    }

    /// For each row those of these tokens that are in it. `tokens` are packed indices, ascending.
    pub(crate) fn by_row(&self, tokens: &[usize]) -> Vec<Vec<usize>> {
        let of_row = |row: &RowLayout| {
            let all = row.tokens();
            let [from, to] = [all.start, all.end].map(|end| tokens.partition_point(|token| *token < end));
            tokens[from..to].to_vec()
        };
        self.rows.iter().map(of_row).collect()
    }

    /// What each of some tokens may see, as a boolean mask `[rows, most queries of a row, longest]` over rows padded on the
    /// right: `true` where the query attends to the key (third dimension). `queries` are packed indices, of each row its own.
    /// Padded queries see the row's first token, so that no softmax is over nothing.
    pub(crate) fn mask(&self, queries: &[Vec<usize>], window: Option<usize>, device: Device) -> Result<Tensor> {
        let (longest, most) = (self.longest_row(), queries.iter().map(Vec::len).max().unwrap_or(0));
        let mut mask = vec![false; self.rows.len() * most * longest];
        for (index, (row, queries)) in self.rows.iter().zip(queries).enumerate() {
            let tokens = row.tokens();
            for at in 0..most {
                let line = &mut mask[(index * most + at) * longest..][..longest];
                match queries.get(at) {
                    None => line[0] = true,
                    Some(query) => {
                        for (cell, key) in line.iter_mut().zip(tokens.start..=*query) {
                            *cell = self.row_sees(row, *query, key, window);
                        }
                    }
                }
            }
        }
        let size = [self.rows.len() as i64, most as i64, longest as i64];
        Ok(Tensor::f_from_slice(&mask)?.f_view(size)?.f_to_device(device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Continuation, Tokens};

    fn example(prompt: usize, harmful: usize, safe: usize) -> Example {
        let continuation = |kind, len| Continuation { kind, tokens: Tokens::of_kind(vec![1; len], TokenKind::Target) };
        Example::new(
            "e",
            Tokens::of_kind(vec![0; prompt], TokenKind::Template),
            vec![continuation(ContinuationKind::Harmful, harmful), continuation(ContinuationKind::Safe, safe)],
        )
        .unwrap()
    }

    #[test]
    fn continuations_restart_behind_the_prompt() {
        let layout = Layout::of_examples([&example(3, 2, 3), &example(1, 1, 1)]);
        assert_eq!(layout.positions(), [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1]);
        let targets = layout.targets(ContinuationKind::Safe);
        assert_eq!(
            targets.iter().map(|t| (t.token, t.predictor)).collect::<Vec<_>>(),
            [(5, 2), (6, 5), (7, 6), (10, 8)]
        );
    }

    #[test]
    fn a_continuation_sees_the_prompt_and_itself() {
        let layout = Layout::of_examples([&example(2, 1, 2)]);
        let seen = |window| -> Vec<Vec<usize>> {
            (0..5).map(|query| (0..5).filter(|key| layout.sees(query, *key, window)).collect()).collect()
        };
        assert_eq!(seen(None), [vec![0], vec![0, 1], vec![0, 1, 2], vec![0, 1, 3], vec![0, 1, 3, 4]]);
        assert_eq!(seen(Some(2)), [vec![0], vec![0, 1], vec![1, 2], vec![1, 3], vec![3, 4]]);
    }

    #[test]
    fn the_mask_is_what_tokens_see() {
        let layout = Layout::of_examples([&example(2, 1, 2), &example(1, 1, 1)]);
        let all: Vec<usize> = (0..layout.tokens()).collect();
        let mask = layout.mask(&layout.by_row(&all), Some(2), Device::Cpu).unwrap();
        let starts = [0, 5];
        let lengths = [5, 3];
        for row in 0..2 {
            for query in 0..5 {
                for key in 0..5 {
                    let expected = if query >= lengths[row] {
                        key == 0
                    } else {
                        key < lengths[row] && layout.sees(starts[row] + query, starts[row] + key, Some(2))
                    };
                    assert_eq!(mask.int64_value(&[row as i64, query as i64, key as i64]) != 0, expected);
                }
            }
        }
    }

    #[test]
    fn padding_on_either_side_is_the_same_layout() {
        let left = Tensor::from_slice2(&[[0i64, 1, 1], [1, 1, 1]]);
        let right = Tensor::from_slice2(&[[1i64, 1, 0], [1, 1, 1]]);
        let (from_left, left_index) = Layout::from_padded(&left).unwrap();
        let (from_right, right_index) = Layout::from_padded(&right).unwrap();
        assert_eq!(from_left, from_right);
        assert_eq!((left_index, right_index), (vec![1, 2, 3, 4, 5], vec![0, 1, 3, 4, 5]));
        let packed = Tensor::from_slice(&[1i64, 2, 3, 4, 5]);
        let padded = from_left.to_padded(&packed, Side::Left).unwrap();
        assert_eq!(Vec::<Vec<i64>>::try_from(padded).unwrap(), [[0, 1, 2], [3, 4, 5]]);
    }

    #[test]
    fn a_gap_in_the_mask_is_an_error() {
        let gap = Layout::from_padded(&Tensor::from_slice2(&[[1i64, 0, 1]])).unwrap_err();
        assert!(gap.to_string().contains("row 0"), "{gap}");
        assert!(Layout::from_padded(&Tensor::from_slice2(&[[0i64, 0, 0]])).is_err());
    }
}

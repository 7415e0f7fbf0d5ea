//! Examples as tensors.

use std::collections::{BTreeMap, HashSet};

use tch::{Device, Kind, Tensor};

use super::{ContinuationKind, Example, Layout, Target, TokenKind, Tokens};
use crate::{Error, Result, tensor};

/// Rows of examples on a device: token ids, where each token stands, and numbers that were computed before training.
#[derive(Debug)]
pub struct Batch {
    examples: Vec<Example>,
    layout: Layout,
    ids: Tensor,
    values: BTreeMap<String, Vec<Vec<f64>>>,
}

/// Some rows of a batch, and which they were.
#[derive(Debug)]
pub struct Selection {
    /// The rows as a batch of their own.
    pub batch: Batch,
    /// For each row of it, its row in the batch that it was taken from.
    pub rows: Vec<usize>,
}

impl Batch {
    /// The batch of these examples, in order.
    ///
    /// # Errors
    /// If there is no example, or the ids cannot be brought to the device.
    pub fn new(examples: Vec<Example>, device: Device) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::mismatch("examples of a batch", "at least one", 0));
        }
        let layout = Layout::of_examples(&examples);
        let ids: Vec<i64> = examples.iter().flat_map(row_ids).collect();
        let ids = tensor::index(&ids, device)?;
        Ok(Self { examples, layout, ids, values: BTreeMap::new() })
    }

    /// The batch of these examples with their continuation of a kind alone.
    ///
    /// # Errors
    /// If an example has no such continuation, or as [`Batch::new`].
    pub fn of_kind(examples: &[Example], kind: ContinuationKind, device: Device) -> Result<Self> {
        if let Some(without) = examples.iter().find(|example| example.continuation(kind).is_none()) {
            return Err(Error::example(without.id(), format!("has no {kind:?} continuation")));
        }
        Self::new(examples.iter().map(|example| example.keep(&[kind])).collect(), device)
    }

    /// Adds numbers computed beforehand under a name: for each row a list, of one number, or of one for each
    /// token or target.
    ///
    /// # Errors
    /// If there is not one list per row.
    pub fn with_values(mut self, name: impl Into<String>, rows: Vec<Vec<f64>>) -> Result<Self> {
        let name = name.into();
        if rows.len() != self.rows() {
            return Err(Error::mismatch(format!("values {name:?}"), format!("{} rows", self.rows()), rows.len()));
        }
        self.values.insert(name, rows);
        Ok(self)
    }

    /// The numbers computed beforehand under a name, float64, the lists of all rows behind each other: `[rows]` where each
    /// row has one, `[tokens]` or `[targets]` where each has one for each of those.
    ///
    /// # Errors
    /// If nothing was computed under that name.
    pub fn values(&self, name: &str) -> Result<Tensor> {
        let Some(rows) = self.values.get(name) else {
            let known: Vec<_> = self.values.keys().collect();
            return Err(Error::mismatch("precomputed values of a batch", format!("{name:?}"), format!("{known:?}")));
        };
        Ok(Tensor::f_from_slice(&rows.concat())?.f_to_device(self.device())?)
    }

    /// The examples, one per row.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.examples.len()
    }

    /// Where each token stands.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Token ids `[tokens]`, int64.
    pub fn ids(&self) -> &Tensor {
        &self.ids
    }

    /// The device of all tensors.
    pub fn device(&self) -> Device {
        self.ids.device()
    }

    /// The targets of the continuations of a kind: where they stand, and index tensors for them.
    ///
    /// # Errors
    /// If the index tensors cannot be made.
    pub fn targets(&self, kind: ContinuationKind) -> Result<Targets> {
        Targets::new(self.layout.targets(kind), self)
    }

    /// The rows that have a continuation of one of these kinds, with those continuations alone; none if no row has.
    ///
    /// # Errors
    /// If tensors cannot be made.
    pub fn select(&self, kinds: &[ContinuationKind]) -> Result<Option<Selection>> {
        let rows: Vec<usize> = (0..self.rows())
            .filter(|row| self.examples[*row].continuations().iter().any(|one| kinds.contains(&one.kind)))
            .collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let examples = rows.iter().map(|row| self.examples[*row].keep(kinds)).collect();
        Ok(Some(Selection { batch: self.derive(examples, &rows)?, rows }))
    }

    /// The same batch, the prompt of one row having another text of the user: the user tokens of the row's prompt are
    /// replaced by `ids`, where the first of them stood. For attacks that change tokens.
    ///
    /// # Errors
    /// If there is no such row, or its prompt has no user token.
    pub fn with_user_content(&self, row: usize, ids: &[i64]) -> Result<Self> {
        let example =
            self.examples.get(row).ok_or_else(|| Error::mismatch("row", format!("< {}", self.rows()), row))?;
        let (old, kinds) = (example.prompt().ids(), example.prompt().kinds());
        let Some(first) = kinds.iter().position(|kind| *kind == TokenKind::User) else {
            return Err(Error::example(example.id(), "the prompt has no user content to replace"));
        };
        let mut prompt = Tokens::default();
        for (index, (id, kind)) in old.iter().zip(kinds).enumerate() {
            if index == first {
                prompt.extend(&Tokens::of_kind(ids.to_vec(), TokenKind::User));
            }
            if *kind != TokenKind::User {
                prompt.extend(&Tokens::of_kind(vec![*id], *kind));
            }
        }
        let mut examples = self.examples.clone();
        examples[row] = example.with_prompt(prompt)?;
        self.with_examples(examples)
    }

    /// The same batch, these rows having the prompts of another batch's rows, in order.
    pub(crate) fn with_prompts_of(&self, other: &Self, rows: &[usize]) -> Result<Self> {
        let mut examples = self.examples.clone();
        for (row, other) in rows.iter().zip(&other.examples) {
            examples[*row] = examples[*row].with_prompt(other.prompt().clone())?;
        }
        self.with_examples(examples)
    }

    /// Other examples in place of these, row by row.
    fn with_examples(&self, examples: Vec<Example>) -> Result<Self> {
        let rows: Vec<usize> = (0..self.rows()).collect();
        self.derive(examples, &rows)
    }

    fn derive(&self, examples: Vec<Example>, rows: &[usize]) -> Result<Self> {
        let mut batch = Self::new(examples, self.device())?;
        for (name, values) in &self.values {
            batch.values.insert(name.clone(), rows.iter().map(|row| values[*row].clone()).collect());
        }
        Ok(batch)
    }
}

/// The predicted tokens of a batch, as index tensors.
#[derive(Debug)]
pub struct Targets {
    /// Where each target stands.
    pub list: Vec<Target>,
    /// The ids to predict `[targets]`, int64.
    pub ids: Tensor,
    /// The tokens whose hidden states predict them `[targets]`, int64, packed indices.
    pub predictors: Tensor,
    /// The row of each target `[targets]`, int64.
    pub rows: Tensor,
    /// Targets per row `[rows]`, float64; 0 where a row has none.
    pub counts: Tensor,
}

impl Targets {
    fn new(list: Vec<Target>, batch: &Batch) -> Result<Self> {
        let device = batch.device();
        let index = |of: fn(&Target) -> usize| -> Result<Tensor> {
            let values: Vec<i64> = list.iter().map(|target| of(target) as i64).collect();
            tensor::index(&values, device)
        };
        let mut counts = vec![0f64; batch.rows()];
        for target in &list {
            counts[target.row] += 1.0;
        }
        Ok(Self {
            ids: batch.ids.f_index_select(0, &index(|target| target.token)?)?,
            predictors: index(|target| target.predictor)?,
            rows: index(|target| target.row)?,
            counts: Tensor::f_from_slice(&counts)?.f_to_device(device)?,
            list,
        })
    }

    /// The mean over each row's targets: `[targets]` to `[rows]`; 0 for a row without targets.
    ///
    /// # Errors
    /// If `values` is not `[targets]`.
    pub fn mean_per_row(&self, values: &Tensor) -> Result<Tensor> {
        self.check(values)?;
        mean_by_row(values, &self.rows, &self.counts)
    }

    /// The mean over the first target of each of a row's answers, of which a chat of several turns has several: `[targets]` to
    /// `[rows]`; 0 for a row without targets.
    ///
    /// # Errors
    /// If `values` is not `[targets]`.
    pub fn mean_of_firsts_per_row(&self, values: &Tensor) -> Result<Tensor> {
        self.check(values)?;
        // What is predicted by a target goes on; the first of an answer is predicted by what stands before it.
        let targets: HashSet<usize> = self.list.iter().map(|target| target.token).collect();
        let firsts = (self.list.iter().enumerate())
            .filter_map(|(at, target)| (!targets.contains(&target.predictor)).then_some(at as i64));
        let firsts = tensor::index(&firsts.collect::<Vec<_>>(), values.device())?;
        let rows = self.rows.f_index_select(0, &firsts)?;
        let ones = Tensor::f_ones(firsts.size(), (self.counts.kind(), self.counts.device()))?;
        let counts = self.counts.f_zeros_like()?.f_index_add(0, &rows, &ones)?;
        mean_by_row(&values.f_index_select(0, &firsts)?, &rows, &counts)
    }

    fn check(&self, values: &Tensor) -> Result<()> {
        if values.size() != [self.list.len() as i64] {
            return Err(Error::mismatch(
                "values per target",
                format!("[{}]", self.list.len()),
                format!("{:?}", values.size()),
            ));
        }
        Ok(())
    }

    /// [`Targets::counts`] in another dtype.
    ///
    /// # Errors
    /// If the tensor cannot be made.
    pub fn counts_as(&self, kind: Kind) -> Result<Tensor> {
        Ok(self.counts.f_to_kind(kind)?)
    }
}

/// Values `[values]` of rows `[values]`, of which there are so many in each row `[rows]`: to their means `[rows]`.
fn mean_by_row(values: &Tensor, rows: &Tensor, counts: &Tensor) -> Result<Tensor> {
    let sums = Tensor::f_zeros(counts.size(), (values.kind(), values.device()))?.f_index_add(0, rows, values)?;
    Ok(sums.f_div(&counts.f_clamp_min(1.0)?.f_to_kind(values.kind())?)?)
}

fn row_ids(example: &Example) -> impl Iterator<Item = i64> + '_ {
    let continuations = example.continuations().iter().flat_map(|one| one.tokens.ids());
    example.prompt().ids().iter().chain(continuations).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Continuation;

    fn example(id: &str, kinds: &[ContinuationKind]) -> Example {
        let prompt = Tokens::new(vec![1, 7, 8, 2], {
            use TokenKind::{Template, User};
            vec![Template, User, User, Template]
        });
        let continuations = kinds.iter().map(|kind| Continuation {
            kind: *kind,
            tokens: Tokens::of_kind(vec![10 + *kind as i64, 0], TokenKind::Target),
        });
        Example::new(id, prompt.unwrap(), continuations.collect()).unwrap()
    }

    fn ids(batch: &Batch) -> Vec<i64> {
        Vec::try_from(batch.ids()).unwrap()
    }

    #[test]
    fn selecting_keeps_rows_continuations_and_values() {
        use ContinuationKind::{Harmful, Safe, Utility};
        let batch = Batch::new(vec![example("u", &[Utility]), example("h", &[Harmful, Safe])], Device::Cpu).unwrap();
        let batch = batch.with_values("reference", vec![vec![], vec![0.5]]).unwrap();
        let selection = batch.select(&[Harmful]).unwrap().unwrap();
        assert_eq!(selection.rows, [1]);
        assert_eq!(ids(&selection.batch), [1, 7, 8, 2, 10, 0]);
        assert_eq!(Vec::<f64>::try_from(selection.batch.values("reference").unwrap()).unwrap(), [0.5]);
        assert!(batch.values("other").unwrap_err().to_string().contains("reference"));
        assert!(selection.batch.select(&[Utility]).unwrap().is_none());
    }

    #[test]
    fn a_target_may_have_the_id_zero() {
        let batch = Batch::new(vec![example("h", &[ContinuationKind::Harmful])], Device::Cpu).unwrap();
        let targets = batch.targets(ContinuationKind::Harmful).unwrap();
        assert_eq!(Vec::<i64>::try_from(&targets.ids).unwrap(), [10, 0]);
        assert_eq!(Vec::<i64>::try_from(&targets.predictors).unwrap(), [3, 4]);
    }

    #[test]
    fn a_row_mean_is_over_its_own_targets() {
        let batch = Batch::new(
            vec![example("u", &[ContinuationKind::Utility]), example("h", &[ContinuationKind::Harmful])],
            Device::Cpu,
        );
        let targets = batch.unwrap().targets(ContinuationKind::Harmful).unwrap();
        let means = targets.mean_per_row(&Tensor::from_slice(&[1.0, 4.0])).unwrap();
        assert_eq!(Vec::<f64>::try_from(means).unwrap(), [0.0, 2.5]);
    }

    #[test]
    fn the_first_target_of_every_answer_of_a_row_counts() {
        use ContinuationKind::{Harmful, Utility};
        use TokenKind::{Target, Template, User};
        let chat = |id: &str, kinds: Vec<TokenKind>| {
            let tokens = Tokens::new(vec![5; kinds.len()], kinds).unwrap();
            let continuation = Continuation { kind: Utility, tokens };
            Example::new(id, Tokens::of_kind(vec![1, 2], User), vec![continuation]).unwrap()
        };
        let one = chat("one turn", vec![Target, Target, Target]);
        let two = chat("two turns", vec![Target, Target, User, Template, Target, Target, Template]);
        let batch = Batch::new(vec![one, example("h", &[Harmful]), two], Device::Cpu).unwrap();
        let targets = batch.targets(Utility).unwrap();
        let values = Tensor::from_slice(&[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]);
        let means = targets.mean_of_firsts_per_row(&values).unwrap();
        assert_eq!(Vec::<f64>::try_from(means).unwrap(), [1.0, 0.0, 20.0]);
        let error = targets.mean_of_firsts_per_row(&Tensor::from_slice(&[1.0])).unwrap_err().to_string();
        assert!(error.contains("[7]") && error.contains("[1]"), "{error}");
    }

    #[test]
    fn user_content_is_replaced_where_it_stood() {
        let batch = Batch::new(vec![example("h", &[ContinuationKind::Harmful])], Device::Cpu).unwrap();
        let replaced = batch.with_user_content(0, &[5, 6, 7]).unwrap();
        assert_eq!(ids(&replaced), [1, 5, 6, 7, 2, 10, 0]);
        assert!(batch.with_user_content(1, &[5]).is_err());
    }
}

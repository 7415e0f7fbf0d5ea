//! What an attack is allowed to do.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Batch, CausalLm, ContinuationKind, Error, Example, Perturbation, Place, Result, Site, TokenKind, tensor};

/// The threat set: which tokens may be moved, where in the model, and how far.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `norm` | `l2` | what is measured against the radius | |
/// | `radius` | `{ relative = 0.1 }` | epsilon | above 0 |
/// | `bounded` | true | project into the ball; without, the radius only sizes the steps | |
/// | `region` | `prompt` | which tokens of the prompt | |
/// | `sites` | `["embeddings"]` | where in the model | blocks that the model has, each once |
/// | `rows` | `harmful` | the rows that have such a continuation | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ThreatModel {
    /// What is measured against the radius.
    pub norm: Norm,
    /// Epsilon.
    pub radius: Radius,
    /// Whether perturbations are projected into the ball. Without, the radius only sizes the steps: a check that
    /// gradients are not masked.
    pub bounded: bool,
    /// Which tokens of the prompt may be moved.
    pub region: Region,
    /// Where in the model; the ball is the same at each site.
    pub sites: Vec<Site>,
    /// Rows that have a continuation of this kind are attacked.
    pub rows: ContinuationKind,
}

impl Default for ThreatModel {
    fn default() -> Self {
        Self {
            norm: Norm::L2,
            radius: Radius::Relative(0.1),
            bounded: true,
            region: Region::Prompt,
            sites: vec![Site::Embeddings],
            rows: ContinuationKind::Harmful,
        }
    }
}

/// The norm of the ball.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// The Euclidean norm of each token's vector (the paper's).
    L2,
    /// The largest number of each token's vector.
    Linf,
    /// The Euclidean norm of all vectors of a row together (FreeLB's).
    RowL2,
}

/// The radius of the ball.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Radius {
    /// Times the mean L2 norm of the rows of the embedding table.
    Relative(f64),
    /// In the units of the un-scaled embeddings, or of the block that is perturbed.
    Absolute(f64),
}

/// Which tokens of a prompt may be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Region {
    /// All: begin-of-sequence, system prompt, role tags, the user's text, the header of the answer (the paper's).
    Prompt,
    /// The user's own text.
    UserContent,
}

/// Tokens this close to the radius, relatively, are counted as at the edge.
const EDGE: f64 = 1e-3;

impl ThreatModel {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let (field, value) = match self.radius {
            Radius::Relative(value) => ("attack.threat.radius.relative", value),
            Radius::Absolute(value) => ("attack.threat.radius.absolute", value),
        };
        Error::check_positive(field, value)?;
        if self.sites.is_empty() {
            return Err(Error::setting("attack.threat.sites", "[]", "at least one site"));
        }
        if let Some(twice) = self.sites.iter().enumerate().find(|(at, site)| self.sites[..*at].contains(site)) {
            return Err(Error::setting(
                "attack.threat.sites",
                format!("{:?} twice", twice.1),
                "a list of each site once",
            ));
        }
        let latent = self.sites.iter().any(|site| *site != Site::Embeddings);
        if latent && matches!(self.radius, Radius::Relative(_)) {
            return Err(Error::setting(
                "attack.threat.radius",
                format!("{:?}", self.radius),
                "absolute where a block is perturbed: the embeddings' norm says nothing about a block's",
            ));
        }
        Ok(())
    }

    /// Checks every field, and that the model has every site.
    pub(super) fn check(&self, model: &dyn CausalLm) -> Result<()> {
        self.validate()?;
        let lacking = |site: &&Site| matches!(site, Site::Block(block) if *block >= model.layers());
        match self.sites.iter().find(lacking) {
            Some(site) => {
                let allowed = format!("a block below {}, the number that the model has", model.layers());
                Err(Error::setting("attack.threat.sites", format!("{site:?}"), allowed))
            }
            None => Ok(()),
        }
    }

    /// The radius in the units of what is perturbed, for a model of this [`CausalLm::mean_embedding_norm`].
    pub fn radius_for(&self, mean_embedding_norm: f64) -> f64 {
        match self.radius {
            Radius::Absolute(radius) => radius,
            Radius::Relative(share) => share * mean_embedding_norm,
        }
    }

    /// The tokens of a batch that may be moved.
    pub fn places(&self, batch: &Batch) -> Vec<Place> {
        let mut places = Vec::new();
        for (row, example) in batch.examples().iter().enumerate() {
            places.extend(self.offsets(example).map(|offset| Place { row, offset }));
        }
        places
    }

    /// The places in a row's prompt that may be moved.
    fn offsets(&self, example: &Example) -> impl Iterator<Item = usize> {
        let kinds = example.prompt().kinds().iter().enumerate();
        let inside = kinds.filter(|(_, kind)| self.region == Region::Prompt || **kind == TokenKind::User);
        inside.map(|(offset, _)| offset)
    }

    /// Checks that there are rows to attack, and that each of them has a token that may be moved.
    pub(crate) fn check_rows(&self, rows: &[Example]) -> Result<()> {
        let mut attacked = rows.iter().filter(|row| row.continuation(self.rows).is_some()).peekable();
        if attacked.peek().is_none() {
            let allowed = "a kind of continuation that the rows have";
            return Err(Error::setting("attack.threat.rows", format!("{:?}", self.rows), allowed));
        }
        match attacked.find(|row| self.offsets(row).next().is_none()) {
            Some(row) => {
                let message = format!("its prompt has no token in the region {:?} that the attack moves", self.region);
                Err(Error::example(row.id(), message))
            }
            None => Ok(()),
        }
    }

    /// The nearest perturbation in the ball.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn project(&self, perturbation: &Perturbation, radius: f64) -> Result<Perturbation> {
        if !self.bounded {
            return perturbation.snapshot();
        }
        let rows = perturbation.rows()?;
        perturbation.map(|values| {
            let values = values.f_detach()?;
            if self.norm == Norm::Linf {
                return Ok(values.f_clamp(-radius, radius)?);
            }
            let factor = self.sizes(&values, &rows)?.f_reciprocal()?.f_mul_scalar(radius)?.f_clamp_max(1.0)?;
            Ok(values.f_mul(&factor.f_unsqueeze(1)?)?)
        })
    }

    /// What the ball bounds, for each token `[places]`: its norm, or with [`Norm::RowL2`] its row's.
    pub(super) fn sizes(&self, values: &Tensor, rows: &Tensor) -> Result<Tensor> {
        match self.norm {
            Norm::L2 => Ok(values.f_norm_scalaropt_dim(2, [1], false)?),
            Norm::Linf => Ok(values.f_abs()?.f_amax([1].as_slice(), false)?),
            Norm::RowL2 => {
                let squares = values.f_square()?.f_sum_dim_intlist([1].as_slice(), false, None::<Kind>)?;
                let count = if rows.numel() == 0 { 0 } else { i64::try_from(rows.f_max()?)? + 1 };
                let sums =
                    Tensor::f_zeros([count], (squares.kind(), squares.device()))?.f_index_add(0, rows, &squares)?;
                Ok(sums.f_sqrt()?.f_index_select(0, rows)?)
            }
        }
    }

    /// Measures a perturbation against the ball.
    ///
    /// # Errors
    /// If it lies outside, which only a fault of an attack can cause, or libtorch fails.
    pub(super) fn measure(&self, perturbation: &Perturbation, radius: f64) -> Result<Extent> {
        let rows = perturbation.rows()?;
        let mut extent = Extent::default();
        for (site, values) in perturbation.parts() {
            let sizes = tensor::numbers(&self.sizes(values, &rows)?)?;
            if let Some(size) =
                sizes.iter().find(|size| self.bounded && (size.is_nan() || **size > radius * (1.0 + EDGE)))
            {
                return Err(Error::mismatch(
                    format!("norm of a perturbation at {site:?}"),
                    format!("<= {radius}"),
                    size,
                ));
            }
            extent.tokens += sizes.len();
            extent.at_edge += sizes.iter().filter(|size| **size >= radius * (1.0 - EDGE)).count();
            extent.size_sum += sizes.iter().sum::<f64>();
        }
        Ok(extent)
    }
}

/// How much of the ball a perturbation uses.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Extent {
    pub(super) tokens: usize,
    pub(super) at_edge: usize,
    pub(super) size_sum: f64,
}

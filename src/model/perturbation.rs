//! What an attack adds to a batch.

use std::collections::{HashMap, HashSet};

use ndarray::ArrayD;
use tch::{Kind, Tensor};

use super::array::to_array;
use super::causal_lm::{Addition, CausalLm, Input};
use crate::{Error, Layout, Result, tensor::snapshot};

/// A token of a prompt: its row, and its place in the row's prompt from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The row of the batch.
    pub row: usize,
    /// The place in that row's prompt.
    pub offset: usize,
}

/// Where in the model a perturbation is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// To the un-scaled embeddings (for Gemma before its factor sqrt(hidden)).
    Embeddings,
    /// To the hidden states that enter this block, from 0.
    Block(usize),
}

/// Vectors added to some prompt tokens, at the embeddings or at named blocks.
///
/// The tokens are named by row and place in the prompt, so that a perturbation found on the harmful continuations alone
/// fits the same prompts with other continuations behind them.
#[derive(Debug)]
pub struct Perturbation {
    places: Vec<Place>,
    parts: Vec<(Site, Tensor)>,
}

impl Perturbation {
    /// Values `[places, hidden]` for each site.
    ///
    /// # Errors
    /// If a tensor does not have one row per place, or a place or a site comes twice: what is added twice would leave
    /// the ball that each place by itself is in.
    pub fn new(places: Vec<Place>, parts: Vec<(Site, Tensor)>) -> Result<Self> {
        let mut seen = HashSet::with_capacity(places.len());
        if let Some(twice) = places.iter().find(|place| !seen.insert(**place)) {
            return Err(Error::mismatch("places of a perturbation", "each once", format!("{twice:?} twice")));
        }
        Self::of_distinct(places, parts)
    }

    fn of_distinct(places: Vec<Place>, parts: Vec<(Site, Tensor)>) -> Result<Self> {
        for (index, (site, values)) in parts.iter().enumerate() {
            if values.dim() != 2 || values.size()[0] != places.len() as i64 {
                return Err(Error::mismatch(
                    format!("perturbation at {site:?}"),
                    format!("[{} tokens, hidden]", places.len()),
                    format!("{:?}", values.size()),
                ));
            }
            if parts[..index].iter().any(|(other, _)| other == site) {
                return Err(Error::mismatch("sites of a perturbation", "each once", format!("{site:?} twice")));
            }
        }
        Ok(Self { places, parts })
    }

    /// The tokens, in the order of the values' rows.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Each site with its values `[places, hidden]`.
    pub fn parts(&self) -> &[(Site, Tensor)] {
        &self.parts
    }

    /// The same places with other values at each site, in the order of [`Perturbation::parts`].
    ///
    /// # Errors
    /// If there is not one tensor of the same shape per site.
    pub fn with_values(&self, values: Vec<Tensor>) -> Result<Self> {
        if values.len() != self.parts.len() {
            return Err(Error::mismatch(
                "values of a perturbation",
                format!("{} sites", self.parts.len()),
                values.len(),
            ));
        }
        let parts = self.parts.iter().zip(values).map(|((site, _), values)| (*site, values)).collect();
        Self::of_distinct(self.places.clone(), parts)
    }

    /// Applies a function to the values of every site.
    ///
    /// # Errors
    /// Those of the function, or if it changes the number of rows.
    pub fn map(&self, mut change: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        self.with_values(self.parts.iter().map(|(_, values)| change(values)).collect::<Result<_>>()?)
    }

    /// Applies a function to the values of every site and those of another perturbation at the same sites.
    ///
    /// # Errors
    /// Those of the function, or if the other one's places or sites differ.
    pub fn zip(&self, other: &Self, mut join: impl FnMut(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let same = self.places == other.places
            && self.parts.iter().map(|part| part.0).eq(other.parts.iter().map(|part| part.0));
        if !same {
            return Err(Error::mismatch("two perturbations", "the same places and sites", "different ones"));
        }
        let values = self.parts.iter().zip(&other.parts).map(|((_, a), (_, b))| join(a, b)).collect::<Result<_>>()?;
        self.with_values(values)
    }

    /// A snapshot: storage of its own, outside any graph.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn snapshot(&self) -> Result<Self> {
        self.map(snapshot)
    }

    /// The same perturbation where row i of the batch is now row `rows[i]` of a larger one.
    ///
    /// # Errors
    /// If a place is in a row that `rows` lacks.
    pub fn renumber(self, rows: &[usize]) -> Result<Self> {
        let places = (self.places.iter())
            .map(|place| match rows.get(place.row) {
                Some(row) => Ok(Place { row: *row, ..*place }),
                None => Err(Error::mismatch("row of a perturbation", format!("< {}", rows.len()), place.row)),
            })
            .collect::<Result<_>>()?;
        Self::new(places, self.parts)
    }

    /// What is left of the perturbation in these rows of its batch, row `rows[i]` being now row i.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn restrict(&self, rows: &[usize]) -> Result<Self> {
        let mut places = Vec::new();
        let mut kept = Vec::new();
        for (at, place) in self.places.iter().enumerate() {
            if let Some(row) = rows.iter().position(|row| *row == place.row) {
                places.push(Place { row, ..*place });
                kept.push(at as i64);
            }
        }
        let kept = self.index(&kept)?;
        let parts = self.parts.iter().map(|(site, values)| Ok((*site, values.f_index_select(0, &kept)?)));
        Self::new(places, parts.collect::<Result<_>>()?)
    }

    /// The row of each place `[places]`, int64, on the values' device.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn rows(&self) -> Result<Tensor> {
        let rows: Vec<i64> = self.places.iter().map(|place| place.row as i64).collect();
        self.index(&rows)
    }

    /// The packed index of each place in a layout `[places]`, int64, on the values' device.
    ///
    /// # Errors
    /// If the layout has no such row or its prompt is shorter.
    pub fn tokens(&self, layout: &Layout) -> Result<Tensor> {
        let tokens = (self.places.iter())
            .map(|place| match layout.rows().get(place.row).map(|row| row.prompt()) {
                Some(prompt) if place.offset < prompt.len() => Ok((prompt.start + place.offset) as i64),
                Some(prompt) => Err(Error::mismatch(
                    format!("perturbation, row {}", place.row),
                    format!("places in a prompt of {} tokens", prompt.len()),
                    format!("place {}", place.offset),
                )),
                None => Err(Error::mismatch("row of a perturbation", format!("< {}", layout.rows().len()), place.row)),
            })
            .collect::<Result<Vec<i64>>>()?;
        self.index(&tokens)
    }

    /// This one and another, both over the places and sites that either has, with 0 where it has none of its own.
    pub(crate) fn over_same_places(self, other: &Self) -> Result<(Self, Self)> {
        let sites = |of: &Self| of.parts.iter().map(|(site, _)| *site).collect::<Vec<_>>();
        let (mut places, mut all_sites) = (self.places.clone(), sites(&self));
        if self.places != other.places {
            let own: HashSet<Place> = self.places.iter().copied().collect();
            places.extend(other.places.iter().filter(|place| !own.contains(place)));
        }
        all_sites.extend(sites(other).into_iter().filter(|site| !sites(&self).contains(site)));
        let other = other.over(&places, &all_sites)?;
        Ok((self.over(&places, &all_sites)?, other))
    }

    /// The same over more places and sites.
    fn over(&self, places: &[Place], sites: &[Site]) -> Result<Self> {
        let at: HashMap<Place, i64> = places.iter().copied().zip(0..).collect();
        let index = self.index(&self.places.iter().filter_map(|place| at.get(place).copied()).collect::<Vec<_>>())?;
        let spread = |site: &Site| -> Result<(Site, Tensor)> {
            let own = self.parts.iter().find(|(own, _)| own == site);
            let Some((_, like)) = own.or(self.parts.first()) else {
                return Err(Error::mismatch("sites of a perturbation", "at least one", 0));
            };
            let zeros = || like.f_new_zeros([places.len() as i64, like.size()[1]], (like.kind(), like.device()));
            let values = match own {
                Some((_, values)) if places == self.places => values.shallow_clone(),
                Some((_, values)) => zeros()?.f_index_copy(0, &index, values)?,
                None => zeros()?,
            };
            Ok((*site, values))
        };
        Self::of_distinct(places.to_vec(), sites.iter().map(spread).collect::<Result<_>>()?)
    }

    fn index(&self, values: &[i64]) -> Result<Tensor> {
        let index = Tensor::f_from_slice(values)?;
        Ok(match self.parts.first() {
            Some((_, like)) => index.f_to_device(like.device())?,
            None => index,
        })
    }

    pub(super) fn add_to<M: CausalLm + ?Sized>(&self, model: &M, input: &mut Input) -> Result<()> {
        let tokens = self.tokens(input.layout())?;
        for (site, values) in &self.parts {
            if values.size()[1] != model.hidden_size() {
                return Err(Error::mismatch("width of a perturbation", model.hidden_size(), values.size()[1]));
            }
            match site {
                Site::Embeddings => {
                    let values = values.f_to_kind(input.embeddings().kind())?;
                    input.set_embeddings(input.embeddings().f_index_add(0, &tokens, &values)?);
                }
                Site::Block(block) if *block < model.layers() => {
                    input.push(Addition {
                        block: *block,
                        tokens: tokens.shallow_clone(),
                        values: values.shallow_clone(),
                    });
                }
                Site::Block(block) => {
                    return Err(Error::mismatch("block of a perturbation", format!("< {}", model.layers()), block));
                }
            }
        }
        Ok(())
    }

    /// The values at a site as an array `[places, hidden]`, for analysis; `None` if nothing is added there.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn to_array(&self, site: Site) -> Result<Option<ArrayD<f64>>> {
        let Some((_, values)) = self.parts.iter().find(|part| part.0 == site) else { return Ok(None) };
        to_array(&values.f_detach()?.f_to_kind(Kind::Double)?).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_or_a_site_that_comes_twice_is_refused() {
        let place = |row, offset| Place { row, offset };
        let part = |site| (site, Tensor::from_slice(&[1.0, 2.0, 3.0]).view([3, 1]));
        let of = |places, parts| Perturbation::new(places, parts);
        let apart = vec![place(0, 1), place(1, 1), place(1, 0)];
        assert!(of(apart.clone(), vec![part(Site::Embeddings), part(Site::Block(0))]).is_ok());
        let error = of(vec![place(0, 1), place(1, 1), place(0, 1)], vec![part(Site::Embeddings)]).unwrap_err();
        assert!(error.to_string().contains("Place { row: 0, offset: 1 } twice"), "{error}");
        let error = of(apart.clone(), vec![part(Site::Block(0)), part(Site::Block(0))]).unwrap_err();
        assert!(error.to_string().contains("Block(0) twice"), "{error}");
        // Two rows that become one.
        let two = of(apart, vec![part(Site::Embeddings)]).unwrap();
        assert!(two.renumber(&[4, 4]).is_err());
    }
}

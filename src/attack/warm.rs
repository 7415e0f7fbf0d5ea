//! Perturbations kept from the last time a row was attacked.

use std::collections::{BTreeMap, HashMap};

use tch::{Device, Tensor};

use crate::{Batch, Error, Perturbation, Result, Site, tensor};

/// For each example, the perturbation that its last attack ended with; of several that it returned, the last.
#[derive(Debug, Default)]
pub struct WarmStarts {
    examples: BTreeMap<String, Kept>,
}

/// One row: its places in the prompt, and the values there at each site, on the CPU.
#[derive(Debug)]
struct Kept {
    offsets: Vec<i64>,
    parts: Vec<(Site, Tensor)>,
}

/// Which rows of a perturbation's values belong to a row of the batch, and their places in its prompt.
fn of_row(perturbation: &Perturbation, row: usize) -> (Vec<i64>, Vec<i64>) {
    let places = perturbation.places().iter().enumerate().filter(|(_, place)| place.row == row);
    places.map(|(at, place)| (at as i64, place.offset as i64)).unzip()
}

impl WarmStarts {
    /// Keeps the perturbation of every row of a batch.
    pub(super) fn keep(&mut self, perturbation: &Perturbation, batch: &Batch) -> Result<()> {
        for (row, example) in batch.examples().iter().enumerate() {
            let (at, offsets) = of_row(perturbation, row);
            let parts = (perturbation.parts().iter()).map(|(site, values)| {
                let values = values.f_detach()?.f_index_select(0, &tensor::index(&at, values.device())?)?;
                Ok((*site, values.f_to_device(Device::Cpu)?))
            });
            let kept = Kept { offsets, parts: parts.collect::<Result<_>>()? };
            self.examples.insert(example.id().to_string(), kept);
        }
        Ok(())
    }

    /// The start with what was kept put over it, wherever the same example was perturbed at the same place and site.
    pub(super) fn overlay(&self, start: &Perturbation, batch: &Batch) -> Result<Perturbation> {
        let mut values: Vec<Tensor> = start.parts().iter().map(|part| part.1.shallow_clone()).collect();
        for (row, example) in batch.examples().iter().enumerate() {
            let Some(kept) = self.examples.get(example.id()) else { continue };
            let held: HashMap<i64, i64> = kept.offsets.iter().copied().zip(0..).collect();
            let (at, offsets) = of_row(start, row);
            let both = at.iter().zip(&offsets).filter_map(|(at, offset)| Some((*at, *held.get(offset)?)));
            let (to, from): (Vec<i64>, Vec<i64>) = both.unzip();
            for ((site, _), values) in start.parts().iter().zip(&mut values) {
                let Some((_, kept)) = kept.parts.iter().find(|part| part.0 == *site) else { continue };
                let kept = kept.f_index_select(0, &tensor::index(&from, kept.device())?)?;
                let kept = kept.f_to_device(values.device())?.f_to_kind(values.kind())?;
                *values = values.f_index_copy(0, &tensor::index(&to, values.device())?, &kept)?;
            }
        }
        start.with_values(values)
    }

    /// Everything as named tensors, for a checkpoint.
    pub(crate) fn to_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::new();
        for (id, kept) in &self.examples {
            tensors.push((format!("{id}\u{1f}offsets"), Tensor::f_from_slice(&kept.offsets)?));
            for (site, values) in &kept.parts {
                let site = match site {
                    Site::Embeddings => "embeddings".to_string(),
                    Site::Block(block) => block.to_string(),
                };
                tensors.push((format!("{id}\u{1f}{site}"), values.shallow_clone()));
            }
        }
        Ok(tensors)
    }

    /// The inverse of [`WarmStarts::to_tensors`].
    pub(crate) fn from_tensors(tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let mut examples: BTreeMap<String, Kept> = BTreeMap::new();
        for (name, tensor) in tensors {
            let Some((id, what)) = name.rsplit_once('\u{1f}') else {
                return Err(Error::mismatch("name of a warm start", "an example id and a site", name));
            };
            let kept = examples.entry(id.to_string()).or_insert(Kept { offsets: Vec::new(), parts: Vec::new() });
            match what {
                "offsets" => kept.offsets = Vec::try_from(&tensor)?,
                "embeddings" => kept.parts.push((Site::Embeddings, tensor)),
                block => match block.parse() {
                    Ok(block) => kept.parts.push((Site::Block(block), tensor)),
                    Err(_) => return Err(Error::mismatch("site of a warm start", "embeddings or a number", block)),
                },
            }
        }
        Ok(Self { examples })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Example, Place, TokenKind, Tokens};

    fn batch(ids: &[&str]) -> Batch {
        let prompt = || Tokens::of_kind(vec![1, 2, 3], TokenKind::User);
        Batch::new(ids.iter().map(|id| Example::new(*id, prompt(), Vec::new()).unwrap()).collect(), Device::Cpu)
            .unwrap()
    }

    /// At each site, for each place, one number that tells them all apart.
    fn perturbation(places: &[(usize, usize)], sites: &[Site], first: f64) -> Perturbation {
        let parts = sites.iter().enumerate().map(|(part, site)| {
            let values: Vec<f64> = (0..places.len()).map(|at| first + (10 * part + at) as f64).collect();
            (*site, Tensor::from_slice(&values).unsqueeze(1))
        });
        let places = places.iter().map(|(row, offset)| Place { row: *row, offset: *offset });
        Perturbation::new(places.collect(), parts.collect()).unwrap()
    }

    fn numbers(perturbation: &Perturbation) -> Vec<Vec<f64>> {
        perturbation.parts().iter().map(|part| tensor::numbers(&part.1).unwrap()).collect()
    }

    const SITES: [Site; 3] = [Site::Embeddings, Site::Block(2), Site::Block(10)];
    const WHOLE: [(usize, usize); 3] = [(0, 0), (0, 1), (0, 2)];

    #[test]
    fn several_sites_come_back_from_a_checkpoint_whatever_the_order_of_their_names() {
        let mut warm = WarmStarts::default();
        warm.keep(&perturbation(&WHOLE, &SITES, 1.0), &batch(&["a"])).unwrap();
        let read = WarmStarts::from_tensors(warm.to_tensors().unwrap().into_iter().collect()).unwrap();
        let found = read.overlay(&perturbation(&WHOLE, &SITES, 500.0), &batch(&["a"])).unwrap();
        assert_eq!(numbers(&found), [[1.0, 2.0, 3.0], [11.0, 12.0, 13.0], [21.0, 22.0, 23.0]]);
    }

    #[test]
    fn places_and_sites_that_were_not_perturbed_start_as_they_would() {
        let mut warm = WarmStarts::default();
        let kept = perturbation(&[(1, 2), (1, 0), (0, 1)], &[Site::Block(2)], 1.0);
        warm.keep(&kept, &batch(&["a", "b"])).unwrap();
        let start = perturbation(&WHOLE, &SITES, 500.0);
        let found = numbers(&warm.overlay(&start, &batch(&["b"])).unwrap());
        assert_eq!(found, [[500.0, 501.0, 502.0], [2.0, 511.0, 1.0], [520.0, 521.0, 522.0]]);
        assert_eq!(numbers(&warm.overlay(&start, &batch(&["c"])).unwrap()), numbers(&start));
    }
}

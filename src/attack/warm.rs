//! Perturbations kept from the last time a prompt was attacked.

use std::collections::{BTreeMap, HashMap};

use tch::{Device, Tensor};

use crate::{Batch, Error, Example, Perturbation, Result, Site, digest::bytes_digest, tensor};

/// For each prompt, the perturbation that the last attack on a row of it ended with; of several that it returned, the last.
///
/// By prompt and not by row, since a behaviour has many targets and what brings one of them about is near to what does the
/// next: with a row for each target, few would be attacked twice.
#[derive(Debug, Default)]
pub struct WarmStarts {
    prompts: BTreeMap<String, Kept>,
}

fn key(example: &Example) -> String {
    bytes_digest(&example.prompt().ids().iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>())
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
            self.prompts.insert(key(example), kept);
        }
        Ok(())
    }

    /// The start with what was kept put over it, wherever the same prompt was perturbed at the same place and site.
    pub(super) fn overlay(&self, start: &Perturbation, batch: &Batch) -> Result<Perturbation> {
        let mut values: Vec<Tensor> = start.parts().iter().map(|part| part.1.shallow_clone()).collect();
        for (row, example) in batch.examples().iter().enumerate() {
            let Some(kept) = self.prompts.get(&key(example)) else { continue };
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
        for (prompt, kept) in &self.prompts {
            tensors.push((format!("{prompt}\u{1f}offsets"), Tensor::f_from_slice(&kept.offsets)?));
            for (site, values) in &kept.parts {
                let site = match site {
                    Site::Embeddings => "embeddings".to_string(),
                    Site::Block(block) => block.to_string(),
                };
                tensors.push((format!("{prompt}\u{1f}{site}"), values.shallow_clone()));
            }
        }
        Ok(tensors)
    }

    /// The inverse of [`WarmStarts::to_tensors`].
    pub(crate) fn from_tensors(tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let mut prompts: BTreeMap<String, Kept> = BTreeMap::new();
        for (name, tensor) in tensors {
            let Some((prompt, what)) = name.rsplit_once('\u{1f}') else {
                return Err(Error::mismatch("name of a warm start", "a prompt and a site", name));
            };
            let kept = prompts.entry(prompt.to_string()).or_insert(Kept { offsets: Vec::new(), parts: Vec::new() });
            match what {
                "offsets" => kept.offsets = Vec::try_from(&tensor)?,
                "embeddings" => kept.parts.push((Site::Embeddings, tensor)),
                block => match block.parse() {
                    Ok(block) => kept.parts.push((Site::Block(block), tensor)),
                    Err(_) => return Err(Error::mismatch("site of a warm start", "embeddings or a number", block)),
                },
            }
        }
        Ok(Self { prompts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Place, TokenKind, Tokens};

    /// Prompts of three tokens, told apart by the last.
    fn batch(lasts: &[i64]) -> Batch {
        let rows = lasts.iter().enumerate().map(|(row, last)| {
            Example::new(format!("row {row}"), Tokens::of_kind(vec![1, 2, *last], TokenKind::User), Vec::new()).unwrap()
        });
        Batch::new(rows.collect(), Device::Cpu).unwrap()
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
        warm.keep(&perturbation(&WHOLE, &SITES, 1.0), &batch(&[3])).unwrap();
        let read = WarmStarts::from_tensors(warm.to_tensors().unwrap().into_iter().collect()).unwrap();
        let found = read.overlay(&perturbation(&WHOLE, &SITES, 500.0), &batch(&[3])).unwrap();
        assert_eq!(numbers(&found), [[1.0, 2.0, 3.0], [11.0, 12.0, 13.0], [21.0, 22.0, 23.0]]);
    }

    #[test]
    fn places_and_sites_that_were_not_perturbed_start_as_they_would() {
        let mut warm = WarmStarts::default();
        let kept = perturbation(&[(1, 2), (1, 0), (0, 1)], &[Site::Block(2)], 1.0);
        warm.keep(&kept, &batch(&[3, 4])).unwrap();
        let start = perturbation(&WHOLE, &SITES, 500.0);
        let found = numbers(&warm.overlay(&start, &batch(&[4])).unwrap());
        assert_eq!(found, [[500.0, 501.0, 502.0], [2.0, 511.0, 1.0], [520.0, 521.0, 522.0]]);
        assert_eq!(numbers(&warm.overlay(&start, &batch(&[5])).unwrap()), numbers(&start));
    }
}

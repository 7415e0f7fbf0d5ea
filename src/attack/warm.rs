//! Perturbations kept from the last time a row was attacked.

use std::collections::BTreeMap;

use tch::{Device, Tensor};

use crate::{Batch, Error, Perturbation, Result, Site, tensor};

/// For each example, the perturbation that its last attack ended with.
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

/// Which rows of a perturbation's values belong to a row of the batch.
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

    /// The start with what was kept put over it, for the rows whose kept perturbation has the same places and sites.
    pub(super) fn overlay(&self, start: Perturbation, batch: &Batch) -> Result<Perturbation> {
        let mut start = start;
        for (row, example) in batch.examples().iter().enumerate() {
            let (at, offsets) = of_row(&start, row);
            let Some(kept) = self.examples.get(example.id()).filter(|kept| kept.offsets == offsets) else { continue };
            if !kept.parts.iter().map(|part| part.0).eq(start.parts().iter().map(|part| part.0)) {
                continue;
            }
            let mut values = Vec::new();
            for ((_, old), (_, kept)) in start.parts().iter().zip(&kept.parts) {
                let kept = kept.f_to_device(old.device())?.f_to_kind(old.kind())?;
                values.push(old.f_index_copy(0, &tensor::index(&at, old.device())?, &kept)?);
            }
            start = start.with_values(values)?;
        }
        Ok(start)
    }

    /// Everything as named tensors, for a checkpoint.
    pub(crate) fn to_tensors(&self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        for (id, kept) in &self.examples {
            tensors.push((format!("{id}\u{1f}offsets"), Tensor::from_slice(&kept.offsets)));
            for (site, values) in &kept.parts {
                let site = match site {
                    Site::Embeddings => "embeddings".to_string(),
                    Site::Block(block) => block.to_string(),
                };
                tensors.push((format!("{id}\u{1f}{site}"), values.shallow_clone()));
            }
        }
        tensors
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

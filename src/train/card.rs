//! The model card beside an adapter.

use std::path::Path;

use super::metrics::UpdateMetrics;
use crate::{Result, RunConfig, files, version::VERSION};

/// What a reader of an adapter must know: from what, how and how long it was trained, and what that did.
#[derive(Debug)]
pub struct ModelCard<'a> {
    /// The model that the adapter is for.
    pub base_model: &'a str,
    /// The adapter that training began with, where it was not a fresh one.
    pub begun_from: Option<&'a str>,
    /// The run.
    pub config: &'a RunConfig,
    /// Its metrics.
    pub updates: &'a [UpdateMetrics],
    /// Figures before and after, as Markdown.
    pub results: &'a str,
}

impl ModelCard<'_> {
    /// Writes `README.md` into the adapter's folder.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, folder: impl AsRef<Path>) -> Result<()> {
        files::write(&folder.as_ref().join("README.md"), self.text()?.as_bytes())
    }

    fn text(&self) -> Result<String> {
        let seconds: f64 = self.updates.iter().map(|update| update.seconds).sum();
        let passes: u64 =
            self.updates.iter().filter_map(|update| update.attack.as_ref()).map(|attack| attack.backward_passes).sum();
        let begun_from = self.begun_from.map_or(String::new(), |adapter| format!(" on from the adapter {adapter}"));
        let rows: usize = self.updates.iter().map(|update| update.rows).sum();
        Ok(format!(
            "---\nbase_model: {base}\nlibrary_name: peft\ntags: [adversarial-training]\n---\n\n\
             # Adapter trained against a continuous embedding attack\n\n\
             Trained{begun_from} with advtrain {version}: {updates} updates, {rows} rows, {passes} backward passes of the attack over \
             micro-batches, {seconds:.0} seconds.\n\n\
             ## Before and after\n\n\
             Rates with their count and 95 % Wilson interval, on behaviours and chats that were not trained on.\n\n\
             {results}\n\n\
             ## Limits\n\n\
             Robustness against this attack says nothing certain about others: paraphrased requests lie outside the ball. \
             Over-refusal of harmless requests is in the table and should be looked at before use.\n\n\
             ## The run\n\n```toml\n{config}```\n",
            base = serde_json::json!(self.base_model),
            version = VERSION,
            updates = self.updates.len(),
            results = self.results,
            config = self.config.to_toml()?,
        ))
    }
}

//! The embedding attack as a measurement: against losses by hand, and what must not change them.

#[path = "common/toy.rs"]
mod toy;

use advtrain::{
    AttackSettings, CausalLm, ContinuationKind, EmbeddingAttack, Example, Generation, Input, Measurement, Pass,
    Perturbation, Pgd, Place, Probe, Result, Site, ThreatModel, attack_examples, target_losses,
    tch::{Kind, Tensor},
    to_tensor,
};
use approx::assert_relative_eq;
use toy::{HIDDEN, batch, cross_entropy, decoder, numbers, robust, useful};

fn measurement() -> Measurement {
    Measurement {
        attack: AttackSettings::default(),
        seed: 3,
        rows: 2,
        generation: Some(Generation { max_new_tokens: 3, end_ids: Vec::new(), sampling: None }),
        keep_perturbations: true,
    }
}

fn examples() -> Vec<Example> {
    (0..5).map(robust).collect()
}

/// Log-probabilities of one plain sequence of prompt and harmful answer, from the logits.
fn losses_by_hand(model: &dyn CausalLm, example: &Example, perturbation: Option<&Perturbation>) -> Vec<f64> {
    let rows = batch(vec![example.keep(&[ContinuationKind::Harmful])]);
    let input = Input::of_batch(model, &rows, perturbation, Pass::default()).unwrap();
    let log_probs = model.logits(&model.hidden(&input).unwrap().last).unwrap().log_softmax(-1, Kind::Double);
    let (prompt, ids) = (example.prompt().len(), Vec::<i64>::try_from(rows.ids()).unwrap());
    (prompt..ids.len()).map(|at| -log_probs.double_value(&[at as i64 - 1, ids[at]])).collect()
}

#[test]
fn token_losses_perturbations_and_answers_are_what_the_model_says() {
    let (model, examples) = (decoder(), examples());
    let found = attack_examples(&model, &examples, &mut Pgd::default(), &measurement()).unwrap();
    assert_eq!(found.rows.len(), 5);
    for (row, example) in found.rows.iter().zip(&examples) {
        assert_eq!(row.id, example.id());
        let [(Site::Embeddings, array)] = row.perturbation.as_slice() else { panic!("one site") };
        assert_eq!(array.shape(), [example.prompt().len(), HIDDEN as usize]);
        let places = (0..example.prompt().len()).map(|offset| Place { row: 0, offset }).collect();
        let perturbation = Perturbation::new(places, vec![(Site::Embeddings, to_tensor(array).unwrap())]).unwrap();
        for (losses, perturbation) in [(&row.clean_losses, None), (&row.attacked_losses, Some(&perturbation))] {
            let expected = losses_by_hand(&model, example, perturbation);
            assert_eq!(losses.len(), expected.len());
            losses.iter().zip(expected).for_each(|(a, b)| assert_relative_eq!(*a, b, max_relative = 1e-9));
        }
        assert!(row.attacked_loss() < row.clean_loss());
        let prompt = batch(vec![example.keep(&[])]);
        let said = model.generate(&prompt, Some(&perturbation), measurement().generation.as_ref().unwrap());
        assert_eq!(vec![row.answer.clone()], said.unwrap());
    }
    let mean = |of: fn(&advtrain::AttackedRow) -> f64| found.rows.iter().map(of).sum::<f64>() / 5.0;
    assert_eq!(found.mean_losses(), (mean(|row| row.clean_loss()), mean(|row| row.attacked_loss())));
}

#[test]
fn rows_are_measured_alike_in_any_company() {
    let (model, examples) = (decoder(), examples());
    let run = |rows| attack_examples(&model, &examples, &mut Pgd::default(), &Measurement { rows, ..measurement() });
    let (together, alone) = (run(5).unwrap(), run(1).unwrap());
    for (one, other) in together.rows.iter().zip(&alone.rows) {
        assert_relative_eq!(one.attacked_loss(), other.attacked_loss(), max_relative = 1e-9);
        assert_eq!(one.answer, other.answer);
    }
    assert_eq!(together.statistics.tokens_at_edge, alone.statistics.tokens_at_edge);
    assert_eq!((together.statistics.rows, alone.statistics.rows), (5, 5));
}

/// Gives back its start and one step.
struct TwoIterates(ThreatModel);

impl EmbeddingAttack for TwoIterates {
    fn threat(&self) -> &ThreatModel {
        &self.0
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let start = probe.start()?;
        let (gradient, size) = (probe.gradient(&start)?.gradient, 0.5 * probe.radius());
        let step = start.zip(&gradient, |d, g| Ok(d - g / (g.norm_scalaropt_dim(2, [1], true) + 1e-30) * size))?;
        Ok(vec![start, step])
    }
}

#[test]
fn of_several_perturbations_the_strongest_counts() {
    // The first is no perturbation at all, and the second makes it worse for some rows.
    let found = attack_examples(&decoder(), &examples(), &mut TwoIterates(ThreatModel::default()), &measurement());
    let rows = found.unwrap().rows;
    assert!(rows.iter().all(|row| row.attacked_loss() <= row.clean_loss() + 1e-12));
    let stronger = rows.iter().filter(|row| row.attacked_loss() < row.clean_loss()).count();
    assert!(0 < stronger && stronger < rows.len(), "{stronger}");
}

#[test]
fn losses_of_chats_are_by_token() {
    let (model, chats): (_, Vec<Example>) = (decoder(), (0..3).map(useful).collect());
    let losses = target_losses(&model, &chats, ContinuationKind::Utility, 2).unwrap();
    for (losses, chat) in losses.iter().zip(&chats) {
        assert_eq!(losses.len(), chat.continuation(ContinuationKind::Utility).unwrap().tokens.len());
        let mean: Tensor = cross_entropy(&model, &batch(vec![chat.clone()]), ContinuationKind::Utility, None);
        assert_relative_eq!(losses.mean().unwrap(), numbers(&mean)[0], max_relative = 1e-9);
    }
}

#[test]
fn rows_without_what_is_measured_are_named() {
    let model = decoder();
    let error = attack_examples(&model, &[useful(3)], &mut Pgd::default(), &measurement()).unwrap_err();
    assert_eq!(error.to_string(), "example u3: has no Harmful continuation");
    let error = target_losses(&model, &[robust(2)], ContinuationKind::Utility, 1).unwrap_err();
    assert_eq!(error.to_string(), "example r2: has no Utility continuation");
    let threat = ThreatModel { rows: ContinuationKind::Utility, ..ThreatModel::default() };
    let error =
        attack_examples(&model, &[useful(3)], &mut Pgd { threat, ..Pgd::default() }, &measurement()).unwrap_err();
    assert!(error.to_string().starts_with("attack.threat.rows = Utility"), "{error}");
}

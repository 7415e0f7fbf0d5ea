//! What a probe promises: the gradient, the projection, the region, dropout and dtypes.

#[path = "common/attacks.rs"]
mod attacks;
#[path = "common/toy.rs"]
mod toy;

use advtrain::{
    AttackSettings, CausalLm, ContinuationKind, Decoder, EmbeddingAttack, Input, Norm, Pass, Perturbation, Pgd, Place,
    Probe, Region, Result, Site, StepSize, ThreatModel, TokenKind,
    tch::{Device, Kind, Tensor},
};
use approx::assert_relative_eq;
use attacks::{run, threat, values};
use rand_distr::StandardNormal;
use toy::{HIDDEN, VOCABULARY, adapted, batch, cross_entropy, decoder, numbers, robust};

/// Compares the probe's gradient with central differences of its value, and returns nothing.
struct Differences {
    threat: ThreatModel,
    compared: usize,
}

impl EmbeddingAttack for Differences {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let at = probe.draw(&StandardNormal)?.map(|values| Ok(values * 0.1))?;
        let gradient = probe.gradient(&at)?.gradient;
        for site in 0..at.parts().len() {
            for place in 0..at.places().len() as i64 {
                let coordinate = [place, (3 * place + 1) % HIDDEN];
                let mut shifted = |step: f64| -> Result<f64> {
                    let moved = at.snapshot()?;
                    let values = &moved.parts()[site].1;
                    let _ = values.get(coordinate[0]).get(coordinate[1]).f_add_scalar_(step)?;
                    Ok(numbers(&probe.value(&moved)?).iter().sum())
                };
                let slope = (shifted(1e-5)? - shifted(-1e-5)?) / 2e-5;
                let found = gradient.parts()[site].1.double_value(&coordinate);
                assert!((found - slope).abs() < 1e-7 * (1.0 + slope.abs()), "site {site}: {found}, {slope}");
                self.compared += usize::from(slope.abs() > 1e-4);
            }
        }
        Ok(vec![probe.zero()?])
    }
}

#[test]
fn the_gradient_is_the_slope_at_every_site() {
    let sites = vec![Site::Embeddings, Site::Block(0), Site::Block(1)];
    let threat = ThreatModel { sites, bounded: false, ..threat() };
    let mut attack = Differences { threat, compared: 0 };
    let rows = batch((0..3).map(robust).collect());
    run(&mut attack, &AttackSettings::default(), &decoder(), &rows);
    assert!(attack.compared > 30, "{} slopes were not zero", attack.compared);
}

#[test]
fn projection_is_the_nearest_point_of_the_ball() {
    let places = [(0, 0), (0, 1), (1, 0)].map(|(row, offset)| Place { row, offset }).to_vec();
    let of = |values: &[f64]| {
        Perturbation::new(places.clone(), vec![(Site::Embeddings, Tensor::from_slice(values).view([3, 2]))]).unwrap()
    };
    let point = of(&[3.0, 4.0, 0.3, -0.4, 0.0, -2.5]);
    let row = 25.25f64.sqrt();
    for (norm, radius, expected) in [
        (Norm::L2, 1.0, [0.6, 0.8, 0.3, -0.4, 0.0, -1.0]),
        (Norm::Linf, 1.0, [1.0, 1.0, 0.3, -0.4, 0.0, -1.0]),
        (Norm::RowL2, 1.0, [3.0 / row, 4.0 / row, 0.3 / row, -0.4 / row, 0.0, -1.0]),
        (Norm::RowL2, 3.0, [9.0 / row, 12.0 / row, 0.9 / row, -1.2 / row, 0.0, -2.5]),
        (Norm::L2, 9.0, [3.0, 4.0, 0.3, -0.4, 0.0, -2.5]),
    ] {
        let projected = ThreatModel { norm, ..threat() }.project(&point, radius).unwrap();
        for (found, expected) in numbers(values(&projected)).iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{norm:?}, {radius}: {found} instead of {expected}");
        }
    }
    let zero = ThreatModel::default().project(&of(&[0.0; 6]), 1.0).unwrap();
    assert_eq!(numbers(values(&zero)), [0.0; 6]);
}

#[test]
fn the_region_of_user_content_leaves_other_tokens_alone() {
    let (model, rows) = (decoder(), batch((0..4).map(robust).collect()));
    let embeddings = |perturbation: Option<&Perturbation>| {
        Input::of_batch(&model, &rows, perturbation, Pass::default()).unwrap().embeddings().shallow_clone()
    };
    for (region, moved) in
        [(Region::UserContent, &[TokenKind::User][..]), (Region::Prompt, &[TokenKind::User, TokenKind::Template])]
    {
        let mut attack = Pgd { threat: ThreatModel { region, ..threat() }, ..Pgd::default() };
        let outcome = run(&mut attack, &AttackSettings::default(), &model, &rows);
        let change = embeddings(Some(&outcome.perturbations[0])) - embeddings(None);
        let change = numbers(&change.norm_scalaropt_dim(2, [1], false));
        for (change, kind) in change.iter().zip(rows.layout().kinds()) {
            assert_eq!(*change > 0.0, moved.contains(kind), "{region:?}: {kind:?}");
        }
    }
}

/// Notes the objective and the gradient of the same candidate, three times.
struct SameAgain {
    threat: ThreatModel,
    seen: Vec<(Vec<f64>, Vec<f64>)>,
}

impl EmbeddingAttack for SameAgain {
    fn threat(&self) -> &ThreatModel {
        &self.threat
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let zero = probe.zero()?;
        for _ in 0..3 {
            let found = probe.gradient(&zero)?;
            self.seen.push((numbers(&found.values), numbers(values(&found.gradient))));
        }
        Ok(vec![zero])
    }
}

#[test]
fn dropout_in_the_attack_is_redrawn_at_every_pass_and_off_by_default() {
    let (model, rows) = (adapted(0.5), batch((0..3).map(robust).collect()));
    let seen = |settings: AttackSettings| {
        let mut attack = SameAgain { threat: threat(), seen: Vec::new() };
        run(&mut attack, &settings, &model, &rows);
        attack.seen
    };
    let clean = numbers(&cross_entropy(&model, &rows, ContinuationKind::Harmful, None));
    let off = seen(AttackSettings::default());
    for (found, expected) in off[0].0.iter().zip(clean) {
        assert_relative_eq!(found, &expected, max_relative = 1e-9);
    }
    assert!(off[0] == off[1] && off[1] == off[2]);
    assert!(off == seen(AttackSettings::default()));
    let on = seen(AttackSettings { dropout: true, ..AttackSettings::default() });
    for (one, other) in [(&on[0], &on[1]), (&on[1], &on[2]), (&on[0], &on[2]), (&on[0], &off[0])] {
        assert!(one.0.iter().zip(&other.0).all(|(one, other)| (one - other).abs() > 1e-6), "{one:?}, {other:?}");
        assert_ne!(one.1, other.1);
    }
}

/// Steps of 1e-4, and a look at each gradient's dtype.
struct SmallSteps(ThreatModel);

impl EmbeddingAttack for SmallSteps {
    fn threat(&self) -> &ThreatModel {
        &self.0
    }

    fn perturb(&mut self, probe: &mut Probe) -> Result<Vec<Perturbation>> {
        let mut found = probe.start()?;
        for _ in 0..3 {
            let gradient = probe.gradient(&found)?;
            assert_eq!((gradient.values.kind(), values(&gradient.gradient).kind()), (Kind::Float, Kind::Float));
            found = found.zip(&gradient.gradient, |d, gradient| Ok(d - gradient.sign() * 1e-4))?;
        }
        Ok(vec![found])
    }
}

#[test]
fn small_steps_are_not_rounded_away_under_a_model_in_bfloat16() {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 12,
        "num_hidden_layers": 2, "num_attention_heads": 2
    });
    let model = Decoder::random(json, 0.5, 3, Kind::BFloat16, Device::Cpu).unwrap();
    let rows = batch((0..4).map(robust).collect());
    for attack in [
        &mut SmallSteps(threat()) as &mut dyn EmbeddingAttack,
        &mut Pgd { threat: threat(), steps: 3, size: StepSize::Absolute(1e-4), ..Pgd::default() },
    ] {
        let found = run(attack, &AttackSettings::default(), &model, &rows).perturbations.remove(0);
        let d = values(&found);
        assert_eq!((d.kind(), model.embedding().kind()), (Kind::Float, Kind::BFloat16));
        let whole = numbers(&(d / 1e-4));
        assert!(whole.iter().all(|steps| (steps - steps.round()).abs() < 1e-3 && steps.abs() < 3.001), "{whole:?}");
        assert!(whole.iter().filter(|steps| steps.abs() > 0.5).count() > whole.len() / 2);
        // What the model reads is E + d in float32, most of which bfloat16 would have rounded back to E.
        let tokens = found.tokens(rows.layout()).unwrap();
        let read = |perturbation| {
            let input = Input::of_batch(&model, &rows, perturbation, Pass::default()).unwrap();
            input.embeddings().index_select(0, &tokens)
        };
        let (with, without) = (read(Some(&found)), read(None));
        assert!(with.equal(&(&without + d)) && with.kind() == Kind::Float);
        let lost =
            (without.to_kind(Kind::BFloat16) + d.to_kind(Kind::BFloat16)).to_kind(Kind::Float).eq_tensor(&without);
        assert!(lost.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]) > 0.5);
    }
}

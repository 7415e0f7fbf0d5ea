//! AdamW with gradient clipping, its state in the open so that a run can go on.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, ErrorKind, Parameter, Result, tensor};

/// Settings of AdamW (Loshchilov and Hutter 2019). The defaults are the paper's.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `learning_rate` | 2e-4 | at the top of the schedule | above 0 |
/// | `beta1` | 0.9 | decay of the mean gradient | 0 to below 1 |
/// | `beta2` | 0.999 | decay of the mean square | 0 to below 1 |
/// | `epsilon` | 1e-8 | added to the root of the mean square | above 0 |
/// | `weight_decay` | 0.001 | decoupled, times the learning rate | at least 0 |
/// | `max_gradient_norm` | 0.3 | the gradient is scaled down to this L2 norm; 0: never | at least 0 |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// At the top of the schedule.
    pub learning_rate: f64,
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub epsilon: f64,
    /// Decoupled weight decay, times the learning rate.
    pub weight_decay: f64,
    /// The gradient of all parameters together is scaled down to this L2 norm; 0: never.
    pub max_gradient_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.001,
            max_gradient_norm: 0.3,
        }
    }
}

impl OptimizerConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        Error::check_positive("train.optimizer.learning_rate", self.learning_rate)?;
        Error::check_below_one("train.optimizer.beta1", self.beta1)?;
        Error::check_below_one("train.optimizer.beta2", self.beta2)?;
        Error::check_positive("train.optimizer.epsilon", self.epsilon)?;
        Error::check_not_negative("train.optimizer.weight_decay", self.weight_decay)?;
        let norm = self.max_gradient_norm;
        if !(norm >= 0.0 && norm.is_finite()) {
            return Err(Error::setting("train.optimizer.max_gradient_norm", norm, "at least 0 and finite; 0: never"));
        }
        Ok(())
    }
}

/// AdamW over a list of float32 (or float64) tensors.
#[derive(Debug)]
pub(super) struct AdamW {
    config: OptimizerConfig,
    slots: Vec<Slot>,
    steps: i64,
}

#[derive(Debug)]
struct Slot {
    parameter: Parameter,
    first: Tensor,
    second: Tensor,
}

const STEPS: &str = "steps";

impl AdamW {
    pub(super) fn new(parameters: Vec<Parameter>, config: OptimizerConfig) -> Result<Self> {
        config.validate()?;
        let mut names = BTreeSet::new();
        let slots = parameters.into_iter().map(|parameter| {
            // The state of two tensors of one name could not be told apart.
            if !names.insert(parameter.name.clone()) {
                return Err(Error::mismatch("names of the trained tensors", "each once", parameter.name));
            }
            if !matches!(parameter.tensor.kind(), Kind::Float | Kind::Double) {
                let found = format!("{:?} for {}", parameter.tensor.kind(), parameter.name);
                return Err(Error::mismatch("dtype of a trained tensor", "float32 or float64", found));
            }
            let zeros = || -> Result<Tensor> { Ok(parameter.tensor.f_detach()?.f_zeros_like()?) };
            Ok(Slot { first: zeros()?, second: zeros()?, parameter })
        });
        Ok(Self { config, slots: slots.collect::<Result<_>>()?, steps: 0 })
    }

    /// The L2 norm of all gradients together; a tensor without gradient counts as zero.
    pub(super) fn gradient_norm(&self) -> Result<f64> {
        let mut squares = Vec::new();
        for slot in &self.slots {
            let gradient = slot.parameter.tensor.f_grad()?;
            if gradient.defined() {
                squares.push(gradient.f_norm()?.f_to_kind(Kind::Double)?.f_square()?);
            }
        }
        if squares.is_empty() {
            return Ok(0.0);
        }
        Ok(tensor::number(&Tensor::f_stack(&squares, 0)?.f_sum(Kind::Double)?)?.sqrt())
    }

    /// One update with gradients of the given norm, clipped as torch's `clip_grad_norm_` does.
    pub(super) fn step(&mut self, learning_rate: f64, norm: f64) -> Result<()> {
        if !norm.is_finite() {
            return Err(ErrorKind::NotFinite { what: "norm of the gradient".into(), value: norm }.into());
        }
        let _guard = tch::no_grad_guard();
        let OptimizerConfig { beta1, beta2, epsilon, weight_decay, max_gradient_norm, .. } = self.config;
        let clip = if max_gradient_norm > 0.0 { (max_gradient_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.steps += 1;
        let count = self.steps as f64;
        let step_size = learning_rate / (1.0 - beta1.powf(count));
        let root_correction = (1.0 - beta2.powf(count)).sqrt();
        for slot in &mut self.slots {
            let gradient = slot.parameter.tensor.f_grad()?;
            // An undefined gradient is one of zero: once zeroed it is defined, and a resumed run must not differ by that.
            let gradient = match gradient.defined() {
                true => gradient.f_mul_scalar(clip)?,
                false => slot.first.f_zeros_like()?,
            };
            let _ = slot.first.f_mul_scalar_(beta1)?.f_add_(&gradient.f_mul_scalar(1.0 - beta1)?)?;
            let _ = slot.second.f_mul_scalar_(beta2)?.f_add_(&gradient.f_square()?.f_mul_scalar(1.0 - beta2)?)?;
            let root = slot.second.f_sqrt()?.f_div_scalar(root_correction)?.f_add_scalar(epsilon)?;
            let change = slot.first.f_div(&root)?.f_mul_scalar(-step_size)?;
            let _ = slot.parameter.tensor.f_mul_scalar_(1.0 - learning_rate * weight_decay)?.f_add_(&change)?;
        }
        Ok(())
    }

    pub(super) fn zero_gradients(&mut self) -> Result<()> {
        for slot in &self.slots {
            let mut gradient = slot.parameter.tensor.f_grad()?;
            if gradient.defined() {
                let _ = gradient.f_detach_()?.f_zero_()?;
            }
        }
        Ok(())
    }

    /// The trained tensors, their moments and the step count, by name.
    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state = vec![(STEPS.to_string(), Tensor::f_from_slice(&[self.steps])?)];
        for Slot { parameter, first, second } in &self.slots {
            for (what, tensor) in [("value", &parameter.tensor), ("first", first), ("second", second)] {
                state.push((format!("{what}.{}", parameter.name), tensor.shallow_clone()));
            }
        }
        Ok(state)
    }

    /// Takes back what [`AdamW::state`] gave; nothing changes if a tensor is missing or one too many, or of another shape or
    /// dtype.
    pub(super) fn restore(&mut self, mut state: BTreeMap<String, Tensor>) -> Result<()> {
        let mut take = |name: String, like: Option<&Tensor>| -> Result<Tensor> {
            let form = |kind: Kind, size: Vec<i64>| format!("{kind:?} {size:?}");
            let expected = like.map_or(form(Kind::Int64, vec![1]), |like| form(like.kind(), like.size()));
            let tensor = state.remove(&name);
            let found = tensor.as_ref().map_or("nothing".into(), |tensor| form(tensor.kind(), tensor.size()));
            match tensor {
                Some(tensor) if found == expected => Ok(tensor),
                _ => Err(Error::mismatch(format!("tensor {name:?}"), expected, found)),
            }
        };
        let steps = i64::try_from(take(STEPS.to_string(), None)?.f_reshape([] as [i64; 0])?)?;
        let mut taken = Vec::new();
        for Slot { parameter, first, second } in &self.slots {
            for (what, tensor) in [("value", &parameter.tensor), ("first", first), ("second", second)] {
                taken.push((tensor.shallow_clone(), take(format!("{what}.{}", parameter.name), Some(tensor))?));
            }
        }
        if let Some(name) = state.keys().next() {
            return Err(Error::mismatch("tensors of a checkpoint", "those that are trained", format!("{name:?} too")));
        }
        let _guard = tch::no_grad_guard();
        for (mut own, restored) in taken {
            own.f_copy_(&restored)?;
        }
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use serde_json::Value;

    use super::*;
    use crate::train::Schedule;

    fn tensor(json: &Value) -> Tensor {
        let flat = |list: &[Value]| list.iter().map(|value| value.as_f64().unwrap() as f32).collect::<Vec<_>>();
        let rows = json.as_array().unwrap();
        match rows[0].as_array() {
            None => Tensor::from_slice(&flat(rows)),
            Some(first) => {
                let all: Vec<f32> = rows.iter().flat_map(|row| flat(row.as_array().unwrap())).collect();
                Tensor::from_slice(&all).view([rows.len() as i64, first.len() as i64])
            }
        }
    }

    /// torch.optim.AdamW, clip_grad_norm_ and transformers' cosine schedule wrote the fixture.
    #[test]
    fn updates_equal_torch() {
        let json: Value =
            serde_json::from_str(&std::fs::read_to_string("tests/fixtures/optimizer.json").unwrap()).unwrap();
        let settings = &json["settings"];
        let config = OptimizerConfig {
            learning_rate: settings["lr"].as_f64().unwrap(),
            weight_decay: settings["weight_decay"].as_f64().unwrap(),
            max_gradient_norm: settings["max_grad_norm"].as_f64().unwrap(),
            ..OptimizerConfig::default()
        };
        let total = settings["total_steps"].as_u64().unwrap() as usize;
        let schedule =
            Schedule { warm_up: settings["warmup_steps"].as_f64().unwrap() / total as f64, ..Default::default() };
        let parameters = ["a", "b"]
            .map(|name| Parameter { name: name.into(), tensor: tensor(&json["start"][name]).set_requires_grad(true) });
        let own = parameters.each_ref().map(|parameter| parameter.tensor.shallow_clone());
        let mut optimizer = AdamW::new(parameters.into(), config.clone()).unwrap();
        for (index, step) in json["steps"].as_array().unwrap().iter().enumerate() {
            let learning_rate = config.learning_rate * schedule.factor(index, total);
            assert_relative_eq!(learning_rate, step["lr"].as_f64().unwrap(), max_relative = 1e-9);
            optimizer.zero_gradients().unwrap();
            for (name, own) in ["a", "b"].iter().zip(&own) {
                (own * tensor(&step["grads"][*name])).sum(Kind::Float).backward();
            }
            let norm = optimizer.gradient_norm().unwrap();
            assert_relative_eq!(norm, step["grad_norm"].as_f64().unwrap(), max_relative = 1e-6);
            optimizer.step(learning_rate, norm).unwrap();
            for (name, own) in ["a", "b"].iter().zip(&own) {
                let expected = tensor(&step["params"][*name]);
                let difference = (own.detach() - &expected).abs().max().double_value(&[]);
                // Weight decay alone moves a number by 2e-6 over all steps: a looser bound would not see it.
                assert!(difference <= 5e-7, "step {index}, {name}: {difference}");
            }
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let parameter = Parameter { name: "a".into(), tensor: Tensor::from_slice(&[1.0f32]).set_requires_grad(true) };
        let own = parameter.tensor.shallow_clone();
        let mut optimizer = AdamW::new(vec![parameter], OptimizerConfig::default()).unwrap();
        (&own * f64::NAN).sum(Kind::Float).backward();
        let norm = optimizer.gradient_norm().unwrap();
        assert!(optimizer.step(1e-3, norm).unwrap_err().to_string().contains("norm of the gradient"));
        assert_eq!(own.double_value(&[0]), 1.0);
    }

    #[test]
    fn a_restored_state_goes_on_alike() {
        let fresh = || {
            let tensor = Tensor::from_slice(&[1.0f32, -2.0]).set_requires_grad(true);
            let own = tensor.shallow_clone();
            (AdamW::new(vec![Parameter { name: "a".into(), tensor }], OptimizerConfig::default()).unwrap(), own)
        };
        let update = |optimizer: &mut AdamW, own: &Tensor| {
            optimizer.zero_gradients().unwrap();
            own.square().sum(Kind::Float).backward();
            let norm = optimizer.gradient_norm().unwrap();
            optimizer.step(0.1, norm).unwrap();
        };
        let (mut whole, own) = fresh();
        update(&mut whole, &own);
        let state = whole.state().unwrap().into_iter().map(|(name, tensor)| (name, tensor.detach().copy())).collect();
        update(&mut whole, &own);
        let (mut resumed, again) = fresh();
        resumed.restore(state).unwrap();
        update(&mut resumed, &again);
        assert!(own.equal(&again));
        assert!(resumed.restore(BTreeMap::new()).is_err());
        let mut wide: BTreeMap<_, _> = resumed.state().unwrap().into_iter().collect();
        wide.insert("first.a".into(), Tensor::from_slice(&[0.0f64, 0.0]));
        assert!(resumed.restore(wide).unwrap_err().to_string().contains("expected Float [2], found Double [2]"));
    }

    /// In a fresh process a gradient is undefined where one that goes on has zeros.
    #[test]
    fn an_undefined_gradient_is_one_of_zero() {
        let after = |zeroed: bool| {
            let tensor = Tensor::from_slice(&[1.0f32]).set_requires_grad(true);
            let own = tensor.shallow_clone();
            let parameter = Parameter { name: "a".into(), tensor };
            let mut optimizer = AdamW::new(vec![parameter], OptimizerConfig::default()).unwrap();
            if zeroed {
                own.sum(Kind::Float).backward();
                optimizer.zero_gradients().unwrap();
            }
            assert_eq!(optimizer.gradient_norm().unwrap(), 0.0);
            optimizer.step(0.1, 0.0).unwrap();
            own.detach().double_value(&[0])
        };
        assert_eq!(after(true), after(false));
        assert_relative_eq!(after(false), 1.0 - 0.1 * 0.001, epsilon = 1e-7);
    }

    #[test]
    fn half_precision_and_a_name_twice_are_refused() {
        let of =
            |name: &str, kind| Parameter { name: name.into(), tensor: Tensor::zeros([1], (kind, tch::Device::Cpu)) };
        let new = |list| AdamW::new(list, OptimizerConfig::default());
        assert!(new(vec![of("a", Kind::BFloat16)]).is_err());
        assert!(new(vec![of("a", Kind::Float), of("a", Kind::Float)]).is_err());
    }
}

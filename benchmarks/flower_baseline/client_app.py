"""A plain Flower ClientApp: one step of SGD on a small network and random data."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

FEATURES, EXAMPLES = 30, 32

app = ClientApp()


def network() -> torch.nn.Module:
    """The tensors of fedge's breast-cancer task, as each tensor costs Flower several requests."""
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 1),
    )


def model_of(message: Message) -> torch.nn.Module:
    """The global model that came with the message."""
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return model


def examples(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """This site's data: random, the same in every round."""
    draw = torch.Generator().manual_seed(context.node_id % 2**31)
    x = torch.randn(EXAMPLES, FEATURES, generator=draw)
    return x, torch.randint(2, (EXAMPLES, 1), generator=draw).float()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One step on the site's data."""
    model = model_of(message)
    x, y = examples(context)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), y)
    loss.backward()
    optimizer.step()
    metrics = MetricRecord({"train-loss": loss.item(), "num-examples": EXAMPLES})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss on the site's data."""
    x, y = examples(context)
    with torch.no_grad():
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model_of(message)(x), y)
    metrics = MetricRecord({"eval-loss": loss.item(), "num-examples": EXAMPLES})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)

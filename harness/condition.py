"""The condition of a class-conditional Jet: an image's label, one-hot, as one context token."""
from harness.errors import DataError

NO_LABEL = -1  # the condition is dropped: a context of zeros


def one_hot(labels, classes):
    """Labels (B,) -> a context (B, 1, classes), float32; of NO_LABEL it is 0."""
    import torch
    return (torch.as_tensor(labels)[:, None, None] == torch.arange(classes)).float()


def zero_context(model, x):
    """What a Jet of this JetConfig takes beside images x and no condition: () or (context,)."""
    return (x.new_zeros(len(x), 1, model.context_dim),) if model.context_dim else ()


def check_labels(images, model):
    """Raise DataError for an image set without the labels that a JetConfig's context is made of."""
    classes = model.context_dim
    if classes and images.labels is None:
        raise DataError(f"{images.name} {images.split} has no labels, and this Jet is conditional "
                        f"on them ({classes} classes): give images with labels")
    if classes and (most := images.labels.max()) >= classes:
        raise DataError(f"{images.name} {images.split} has labels up to {most}: this Jet takes 0 "
                        f"to {classes - 1} (--model.context_dim)")

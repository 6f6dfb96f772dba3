"""Names of people and places for training, and others for held-out samples."""

PEOPLE = (
    (
        *("Marta", "Omar", "Nora", "Ivan", "Lena", "Hugo", "Priya", "Tom", "Aisha", "Karl", "Mei", "Paulo"),
        *("Ruth", "Sven", "Dora", "Felix", "Grace", "Hana", "Igor", "Julia", "Kofi", "Laura", "Mona"),
        *("Nils", "Olga", "Peter", "Rosa", "Samir", "Tina", "Viktor", "Wanda", "Yusuf", "Anton", "Bella"),
        *("Carlos", "Diana", "Emil", "Frida", "Jonas", "Clara"),
    ),
    (
        *("Alice", "Boris", "Celia", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "Jack", "Kira"),
        *("Leo", "Maria", "Oscar", "Sofia", "Victor"),
    ),
)
PLACES = (
    (
        *("Leeds", "Rome", "Lyon", "Oslo", "Porto", "Delhi", "Cairo", "Lima", "Turin", "Ghent", "Basel"),
        *("Bergen", "Quito", "Dakar", "Hanoi", "Perth", "Austin", "Denver", "Kyoto", "Milan", "Malmo"),
        *("Nice", "Prague", "Riga", "Seville", "Tunis", "Utrecht", "Vienna", "Warsaw", "Zurich"),
    ),
    (
        *("Paris", "Berlin", "Dublin", "Boston", "Athens", "Madrid", "Geneva", "London", "Tokyo"),
        *("Chicago", "Naples", "Bristol"),
    ),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
